"""Sounds as people have them: the features of the library, channels, rates, silence, an hour."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")
from test_speech import talk, tone  # noqa: E402, F401

from mmcompress.errors import DataError  # noqa: E402
from mmcompress.kinds.audio_encoder.deployed import WINDOW_BATCH, AudioEncoder  # noqa: E402
from mmcompress.runtime.audio import (  # noqa: E402
    SAMPLE_RATE,
    compute_log_mel,
    is_silent,
    open_audio,
)
from mmcompress.runtime.sound_files import (  # noqa: E402
    BLOCK_SAMPLES,
    check_header,
    decode_sound,
)

SOUND = tone(0.5)
CONFIG = {"mels": 80, "frames": 3000, "seconds": 30.0}


def library_features(samples: np.ndarray) -> np.ndarray:
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()
    return extract(samples, sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"][0]


def as_integers(dtype: str) -> np.ndarray:
    if dtype == "uint8":
        return np.round(SOUND * 128 + 128).astype(np.uint8)
    scale = 2.0 ** (8 * np.dtype(dtype).itemsize - 1)
    return np.round(SOUND.astype(np.float64) * scale).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [("int8", 1 / 256), ("uint8", 1 / 256), ("int16", 1e-4), ("int32", 1e-6)]
)
def test_integers_are_scaled_as_soundfile_does(dtype, rounding):
    integers = as_integers(dtype)
    read = open_audio(integers)
    assert read.dtype == np.float32 and np.abs(read - SOUND).max() <= rounding
    if dtype in ("int16", "int32"):
        file = io.BytesIO()
        soundfile.write(file, integers, SAMPLE_RATE, format="WAV", subtype=f"PCM_{dtype[3:]}")
        decoded, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
        assert np.array_equal(read, decoded)
        difference = compute_log_mel(read, CONFIG) - library_features(decoded)
        assert np.abs(difference).max() < 1e-4


@pytest.mark.parametrize("seconds", [1 / SAMPLE_RATE, 0.01, 0.5, 31.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_features_of_any_length_are_those_of_transformers(seconds, dtype):
    samples = np.resize(tone(2.0), max(1, int(seconds * SAMPLE_RATE))).astype(dtype)
    difference = compute_log_mel(open_audio(samples), CONFIG) - library_features(samples)
    assert np.abs(difference).max() < 1e-4


def write_wav(samples: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


LEFT_RIGHT = np.stack([SOUND, 0.5 * SOUND], 1)
MIXED = 0.75 * SOUND


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (LEFT_RIGHT, MIXED),
        (LEFT_RIGHT.T, MIXED),
        (SOUND[:, None], SOUND),
        (SOUND[None], SOUND),
        (SOUND.tolist(), SOUND),
        (tuple(SOUND.tolist()), SOUND),
        (LEFT_RIGHT.tolist(), MIXED),
        ([0, 0, 1, -1] * 100, np.array([0, 0, 1, -1] * 100)),
        (SOUND.astype(np.float16), SOUND.astype(np.float16)),
        (write_wav(SOUND), SOUND),
        (bytearray(write_wav(SOUND)), SOUND),
        (memoryview(write_wav(LEFT_RIGHT)), MIXED),
        (io.BytesIO(write_wav(LEFT_RIGHT)), MIXED),
        ((SOUND, SAMPLE_RATE), SOUND),
        ((SAMPLE_RATE, LEFT_RIGHT), MIXED),
        ({"array": SOUND, "sampling_rate": SAMPLE_RATE}, SOUND),
    ],
    ids=range(16),
)
def test_every_form_of_a_sound_is_the_same_sound(source, expected):
    read = open_audio(source)
    assert read.dtype == np.float32 and read.ndim == 1
    assert np.abs(read - expected).max() < 1e-6


@pytest.mark.parametrize("rate", [8000, 11025, 44100])
def test_arrays_of_another_rate_are_resampled_as_files_are(rate):
    sound = tone(0.4, rate)
    expected = soxr.resample(sound, rate, SAMPLE_RATE)
    for source in ((sound, rate), {"raw": sound, "sampling_rate": rate}, write_wav(sound, rate)):
        assert np.abs(open_audio(source) - expected).max() < 1e-6
    assert len(open_audio((sound[:1], 48_000))) == 1


NAN = np.where(np.arange(len(SOUND)) == 7, np.nan, SOUND).astype(np.float32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (NAN, "1 of 8000 samples are not finite .*, the first at 7"),
        (np.full(5, np.inf), "5 of 5 samples are not finite"),
        (write_wav(NAN), "the given audio: 1 of 8000 samples are not finite"),
        (np.zeros(0, np.float32), "holds no sound"),
        ([], "holds no sound"),
        (write_wav(SOUND[:0]), "holds no sound"),
        (np.zeros((40, 50)), r"shape \[40, 50\]: .* at most 32 channels"),
        (np.zeros((1, 2, 800)), r"shape \[1, 2, 800\]: expected"),
        (np.float32(0.5), r"shape \[\]: expected"),
        ([[0.1, 0.2], [0.1]], "not an array of samples"),
        ((SOUND * 32767).astype(np.float64), "loudest sample is .*Divide them"),
        ((SOUND * 32767).astype(np.int64), "type int64 have no known scale"),
        ((SOUND * 32767).astype(np.uint16), "type uint16 have no known scale"),
        (["a", "b"], "have no known scale"),
        (SOUND > 0, "type bool have no known scale"),
        (SOUND + 0j, "type complex.* have no known scale"),
        ((SOUND, 0), "0 is no sample rate"),
        ({"array": SOUND}, "a mapping needs samples .* and their rate"),
        (None, "have no known scale"),
    ],
    ids=range(19),
)
def test_what_is_no_sound_is_refused_with_its_reason(source, message):
    with pytest.raises(DataError, match=message):
        open_audio(source)


def test_silence_is_what_no_frame_rises_above():
    rng = np.random.default_rng(0)
    assert (
        is_silent(np.zeros(0, np.float32))
        and is_silent(np.zeros(1, np.float32))
        and is_silent(np.zeros(16_000, np.float32))
    )
    assert is_silent(np.full(16_000, 0.2, np.float32))  # the offset of a microphone
    dither = (rng.integers(-1, 2, 16_000) / 32768).astype(np.float32)
    assert is_silent(dither)
    quiet_room = (10 ** (-60 / 20) * rng.standard_normal(16_000)).astype(np.float32)
    assert not is_silent(quiet_room) and not is_silent(tone(0.02))
    click = dither.copy()
    click[-100:] += 0.1 * tone(0.1)[:100]
    assert not is_silent(click)


class CountingSession:
    """A model that gives the mean of its features, and counts what it is given at once."""

    outputs = ("embedding", "tokens")

    def __init__(self):
        self.sizes: list[int] = []

    def __call__(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        features = feed["features"]
        self.sizes.append(len(features))
        return [features.mean(2), features.transpose(0, 2, 1)[:, :4]]


def test_an_hour_is_heard_in_small_batches():
    session = CountingSession()
    config = {"features": {"mels": 16, "frames": 100, "seconds": 1.0}}
    encoder = AudioEncoder({"model": session}, config, Path())
    sound = np.resize(tone(3.3), 60 * SAMPLE_RATE)
    answer = encoder(sound)
    assert max(session.sizes) == WINDOW_BATCH and sum(session.sizes) == len(answer["tokens"]) >= 60
    whole = session({"features": encoder.prepare(sound)})
    assert np.allclose(answer["embedding"], whole[0], atol=1e-6)
    assert np.array_equal(answer["tokens"], whole[1]) and "warnings" not in answer
    # of a silent stretch within a long sound nothing is written
    sound[20 * SAMPLE_RATE : 30 * SAMPLE_RATE] = 0
    answer = encoder(sound)
    assert 45 < len(answer["tokens"]) <= len(answer["embedding"]) - 8


def test_silence_is_told_and_nothing_is_written_of_it(talk, tmp_path):  # noqa: F811
    from mmcompress.export.bundle import BundleContents, write_bundle
    from mmcompress.graph.load_spec import load_spec
    from mmcompress.models.sources import load_models
    from mmcompress.runtime.graph import load_bundle

    spec = load_spec(talk / "spec.yaml")
    contents = BundleContents(models=load_models(spec), lookup_texts={"find": ("w1 w2", "w3")})
    write_bundle(spec, contents, folder=tmp_path / "b", prove=False)
    bundle = load_bundle(tmp_path / "b")
    silence = np.zeros(SAMPLE_RATE, np.float32)
    answer = bundle(audio=silence)
    assert answer["text"] == "" and set(answer) == {"text", "sentence", "score", "warnings"}
    [warning] = answer["warnings"]
    assert warning.startswith("ears: the sound is silent: no part of it reaches -70 dB")
    assert bundle.run(audio=silence)["writer"]["ended"] == ["silence"]
    # a silent request does no work, also where the work of others is repeated
    heard = bundle(audio=tone(0.3))
    assert set(heard) == {"text", "sentence", "score"}
    bundle.writers["writer"].replay = tuple(bundle.writers["writer"].traces)
    assert bundle(audio=silence)["text"] == "" and bundle(audio=tone(0.3))["text"] == heard["text"]


def test_a_long_file_is_decoded_in_blocks(tmp_path):
    rng = np.random.default_rng(0)
    stereo = rng.uniform(-1, 1, (BLOCK_SAMPLES // 2 + 1000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", stereo, 44_100, subtype="FLOAT")
    expected = soxr.resample(stereo.mean(1), 44_100, SAMPLE_RATE)
    assert np.array_equal(open_audio(tmp_path / "a.wav"), expected)


def test_many_channels_are_decoded_in_small_blocks(tmp_path, monkeypatch):
    frames = []
    blocks = soundfile.SoundFile.blocks

    def record_blocks(sound, size, **options):
        frames.append(size)
        return blocks(sound, size, **options)

    monkeypatch.setattr(soundfile.SoundFile, "blocks", record_blocks)
    samples = np.random.default_rng(0).uniform(-1, 1, (50, 1000)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    heard = open_audio(tmp_path / "a.wav")
    assert np.allclose(heard, samples.mean(1), atol=1e-6)
    assert frames == [BLOCK_SAMPLES // 1000]


def test_a_file_with_a_rate_that_no_sound_has_is_refused(tmp_path):
    content = bytearray(write_sound(tmp_path / "a.wav"))
    content[24:28] = (2**31 - 1).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.wav: 2147483647 is no sample rate"):
        open_audio(tmp_path / "a.wav")


def write_sound(path, **options):
    """Write a second of noise."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    soundfile.write(path, samples, 16000, **options)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["wav", "rf64", "aiff", "au", "flac"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_sound_file_that_is_cut_short_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    content = write_sound(path, format=suffix)
    check_header(path)
    assert len(decode_sound(path, 16000)) == len(decode_sound(content, 16000)) == 16000
    cut = content[: int(share * len(content))]
    path.write_bytes(cut)
    if suffix != "flac":
        # the library says nothing, and its samples are fewer
        assert 0 < len(soundfile.read(path)[0]) < 16000
        with pytest.raises(DataError, match=rf"a\.{suffix}: cut short: [0-9,]+ bytes of sound"):
            check_header(path)
    for source in (path, cut):
        with pytest.raises(DataError, match=r"cut short|not readable sound"):
            decode_sound(source, 16000)


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0xFFFFFFFF, 0x7D00 + 44])
def test_a_length_that_a_program_could_not_know_is_no_cut(tmp_path, length):
    """Programs that write into a pipe do not know it, and some count the header as sound."""
    path = tmp_path / "a.wav"
    content = bytearray(write_sound(path))
    place = content.index(b"data") + 4
    content[place : place + 4] = length.to_bytes(4, "little")
    path.write_bytes(content)
    check_header(path)
    assert len(decode_sound(path, 16000)) == len(soundfile.read(path)[0]) == 16000
