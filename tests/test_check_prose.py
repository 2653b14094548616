"""The check of prose finds long sentences, and counts no code, table or heading."""

from __future__ import annotations

import ast

import check_prose

LONG = " ".join(["word"] * 26)


def find_long(text: str) -> list[str]:
    return [
        sentence
        for sentence in check_prose.list_sentences(text)
        if check_prose.count_words(sentence) > check_prose.MAX_WORDS
    ]


def test_a_sentence_ends_at_a_stop_a_paragraph_or_an_item():
    assert find_long(f"{LONG}.") == [f"{LONG}."]
    half = " ".join(["word"] * 13)
    assert not find_long(f"{half}. {half}")
    assert find_long(f"{half}\n{half}")
    assert not find_long(f"{half}\n\n{half}")
    assert not find_long(check_prose.read_page(f"- {half}\n- {half}"))
    assert not find_long(f"`{LONG}` is one word")


def test_code_tables_and_headings_of_a_page_are_left_out():
    page = f"# {LONG}\n\n| {LONG} |\n\n```\n{LONG}\n```\n\n    {LONG}\n"
    assert not find_long(check_prose.read_page(page))
    assert find_long(check_prose.read_page(f"# Heading\n\n{LONG}"))


def test_each_entry_of_a_docstring_is_a_paragraph():
    half = " ".join(["word"] * 14)
    docstring = f"Do it.\n\n    Args:\n        first: {half}\n        second: {half}\n    "
    assert not find_long(check_prose.read_docstring(docstring, 4))
    docstring = f"Do it.\n\n    Args:\n        first: {half}\n            {half}\n    "
    assert find_long(check_prose.read_docstring(docstring, 4))
    legend = f"Do it.\n\nShapes:\n    B  {half}\n    C  {half}\n"
    assert not find_long(check_prose.read_docstring(legend, 0))


def test_messages_are_read_with_one_word_for_each_inserted_value():
    tree = ast.parse(f'raise ValueError(f"{{a}} {" ".join(["word"] * 24)}" f" {{b + c}}")')
    texts = [text for _, text in check_prose.list_texts(tree)]
    assert [check_prose.count_words(text) for text in texts] == [26]


def test_tags_of_a_template_end_a_sentence_and_those_of_a_word_do_not():
    half = " ".join(["word"] * 13)
    assert not find_long(check_prose.read_template(f"<p>{half}</p><p>{half}</p>"))
    assert find_long(check_prose.read_template(f"<p>{half} <b>word</b> {{{{ value }}}} {half}</p>"))
