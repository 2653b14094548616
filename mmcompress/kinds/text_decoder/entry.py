"""The vectors of a sequence to texts, written token by token."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind
from mmcompress.kinds.shared_options import MAX_TOKENS
from mmcompress.spec.node_options import NodeOption

ENTRY = NodeKind(
    deployed="mmcompress.kinds.text_decoder.deployed:TextDecoder",
    trainable="mmcompress.kinds.text_decoder.trainable:TrainableTextDecoder",
    file_keys=("tokenizer",),
    fidelity="mmcompress.export.writer_fidelity:compare_writer",
    inputs={"context": InputPort(types=("tokens",))},
    outputs={"text": "text", "texts": "texts", "scores": "scores"},
    written_modality="text",
    loop_graph="step",
    answer_port="text",
    ending_output="ended",
    losses={"caption": 1.0},
    count_option="candidates",
    options={
        "candidates": NodeOption(
            about=(
                "Texts that a generator writes for an input; it finds them with as many beams,"
                " whatever `num_beams` of its checkpoint says."
            ),
            default=1,
            minimum=1,
            maximum=64,
        ),
        "max_tokens": MAX_TOKENS,
        "prompt": NodeOption(
            about=(
                "What a generator reads before it writes. With an image among the words: `USER:"
                " <image> ASSISTANT:`. Whisper reads it as what was said before."
            ),
            default="",
        ),
        "language": NodeOption(
            about=(
                "Language that a Whisper of several languages writes, such as `en` or `german`. It"
                " must be named, unless the checkpoint names one: a bundle guesses none."
            ),
            default="",
        ),
        "task": NodeOption(
            about=(
                "What a Whisper of several tasks does: `transcribe`, or `translate` to English."
                " Empty: as the checkpoint says, else `transcribe`."
            ),
            default="",
        ),
    },
)
