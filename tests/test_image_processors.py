"""Pictures as the image processor of the model's own library prepares them."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import VISION
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import AutoImageProcessor, CLIPConfig, Dinov2Config, ViTConfig
from transformers.image_utils import load_image

from mmcompress.data.folder import Folder
from mmcompress.errors import DataError, ModelError
from mmcompress.models.base import LoadContext
from mmcompress.models.families import open_clip as open_clip_family
from mmcompress.models.families.image_processors import read_preprocessing
from mmcompress.models.sources import load_model
from mmcompress.runtime import images
from mmcompress.runtime.images import open_image, preprocess_image
from mmcompress.spec.schema import Node

BOUND = 0.03
"""Largest difference of a standardized pixel from the library's."""

SHAPES = ((61, 40), (24, 51), (33, 32), (32, 32), (9, 200), (200, 9), (20, 20))
"""Width and height of the pictures: odd ones show how a processor rounds."""

PROCESSORS = {
    "clip": ("CLIPImageProcessor", {}),
    "no normalizing": ("CLIPImageProcessor", {"do_normalize": False}),
    "no rescaling": ("CLIPImageProcessor", {"do_rescale": False}),
    "neither": ("CLIPImageProcessor", {"do_rescale": False, "do_normalize": False}),
    "rescale factor": ("CLIPImageProcessor", {"rescale_factor": 1 / 127.5}),
    "one mean": ("CLIPImageProcessor", {"image_mean": 0.4, "image_std": 0.2}),
    "size as a number": ("CLIPImageProcessor", {"size": 40}),
    "vit, size as a number": ("ViTImageProcessor", {"size": 40}),
    "shortest edge, other crop": ("CLIPImageProcessor", {"size": {"shortest_edge": 41}}),
    "crop larger than the picture": ("CLIPImageProcessor", {"size": {"shortest_edge": 21}}),
    "crop as a number": ("CLIPImageProcessor", {"crop_size": 27}),
    "oblong crop": ("CLIPImageProcessor", {"crop_size": {"height": 24, "width": 35}}),
    "no resizing, a crop": ("CLIPImageProcessor", {"do_resize": False}),
    "shortest and longest edge": (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 40, "longest_edge": 66}},
    ),
    "no crop": (
        "CLIPImageProcessor",
        {"do_center_crop": False, "size": {"height": 30, "width": 34}},
    ),
    "oblong": ("ViTImageProcessor", {"size": {"height": 24, "width": 40}}),
    "deit": (
        "DeiTImageProcessor",
        {"size": {"height": 41, "width": 39}, "crop_size": {"height": 32, "width": 32}},
    ),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
    "blip": ("BlipImageProcessor", {"size": {"height": 32, "width": 32}}),
    "bit": ("BitImageProcessor", {}),
    "fast": ("CLIPImageProcessorFast", {}),
    "no conversion to RGB": ("CLIPImageProcessor", {"do_convert_rgb": False}),
    "padding without a size": ("CLIPImageProcessor", {"do_pad": True}),
    "padding": (
        "CLIPImageProcessor",
        {
            "do_pad": True,
            "do_center_crop": False,
            "size": {"max_height": 32, "max_width": 36},
            "pad_size": {"height": 32, "width": 36},
        },
    ),
    "llava": ("LlavaImageProcessor", {}),
    "llava, padding": ("LlavaImageProcessor", {"do_pad": True}),
    "llava, padding, no crop": ("LlavaImageProcessor", {"do_pad": True, "do_center_crop": False}),
    "extractor of old": (None, {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}),
    "no name of a class": (None, {}),
    **{f"resample {i}": ("CLIPImageProcessor", {"resample": i}) for i in range(6)},
}
"""Classes and keys of processors; 32 pixels where a case says no size of its own."""


def _fill_sizes(class_name, keys):
    """The keys of a file, with small sizes."""
    filled = {**keys}
    if class_name:
        filled["image_processor_type"] = class_name
    if class_name not in ("ViTImageProcessor",) and "size" not in keys:
        filled["size"] = {"shortest_edge": 32}
    if class_name not in ("ViTImageProcessor", "SiglipImageProcessor", "BlipImageProcessor"):
        filled.setdefault("crop_size", {"height": 32, "width": 32})
    return filled


def _write_config(folder: Path) -> LoadContext:
    CLIPConfig(vision_config=VISION).save_pretrained(folder)
    return LoadContext(kind="image_encoder", path=folder)


def _draw(size, seed=0) -> Image.Image:
    """A picture with smooth parts, edges and noise."""
    width, height = size
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = generator.integers(-40, 40, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def _ask_library(folder, picture):
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=load_image(picture), return_tensors="np")["pixel_values"]
    return np.asarray(pixels)[0]


def _check_same(pixels, expected):
    assert pixels.shape == expected.shape and pixels.dtype == np.float32
    # a plane in 0..255 has a larger unit: the bound is one of standardized values
    unit = max(1.0, float(np.abs(expected).max()) / 3)
    assert np.abs(pixels - expected).max() <= BOUND * unit


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_those_of_the_processor(case, tmp_path):
    class_name, keys = PROCESSORS[case]
    context = _write_config(tmp_path)
    content = json.dumps(_fill_sizes(class_name, keys))
    (tmp_path / "preprocessor_config.json").write_text(content)
    config = json.loads(json.dumps(read_preprocessing(context, (32, 32))))
    for i, size in enumerate(SHAPES):
        picture = _draw(size, i)
        _check_same(preprocess_image(picture, config), _ask_library(tmp_path, picture))


def test_the_nested_file_of_transformers_5_goes_first(tmp_path):
    context = _write_config(tmp_path)
    nested = {"image_processor_type": "ViTImageProcessor", "size": {"height": 20, "width": 20}}
    nested |= {"image_mean": [0.1, 0.2, 0.3], "resample": 0}
    text = json.dumps({"processor_class": "CLIPProcessor", "image_processor": nested})
    (tmp_path / "processor_config.json").write_text(text)
    picture = _draw((45, 31))
    only_nested = preprocess_image(picture, read_preprocessing(context, (32, 32)))
    _check_same(only_nested, _ask_library(tmp_path, picture))
    other = json.dumps(_fill_sizes("CLIPImageProcessor", {}))
    (tmp_path / "preprocessor_config.json").write_text(other)
    both = preprocess_image(picture, read_preprocessing(context, (32, 32)))
    _check_same(both, _ask_library(tmp_path, picture))
    assert np.array_equal(both, only_nested)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    flat = preprocess_image(picture, read_preprocessing(context, (32, 32)))
    _check_same(flat, _ask_library(tmp_path, picture))
    assert flat.shape == (3, 32, 32)


REFUSALS = {
    "longest edge": (
        {"size": {"longest_edge": 32}},
        r"size: {'longest_edge': 32}; expected height and width, shortest_edge",
    ),
    "no crop": (
        {"do_center_crop": False, "size": {"shortest_edge": 32}},
        "without do_center_crop gives every picture sides of its own",
    ),
    "resample": ({"resample": 7}, "resample: 7; expected 0 to 5"),
    "mean": ({"image_mean": [0.5, 0.5]}, r"image_mean: \(0.5, 0.5\); expected three numbers"),
    "std": ({"image_std": [0.5, 0.5, 0]}, "image_std: .*each must be above 0"),
    "rescale": ({"rescale_factor": -1}, "rescale_factor: -1"),
    "huge": ({"crop_size": 10**9}, "crop_size.height: 1000000000; expected 1 to 4096"),
    "size of text": ({"size": "large"}, "its image processor can't be loaded"),
    "half a size": ({"size": {"height": 3}}, "its image processor can't be loaded"),
    "other class": (
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}},
        "ConvNextImageProcessor: its class and its keys crop_pct can't be followed",
    ),
    "own resizing": ({"image_processor_type": "LevitImageProcessor"}, "LevitImageProcessor: its"),
    "own code": (
        {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}},
        "image processor",
    ),
}
"""Keys that are refused, and the message."""


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_followed_is_refused_by_its_name(case, tmp_path):
    keys, message = REFUSALS[case]
    context = _write_config(tmp_path)
    filled = _fill_sizes("CLIPImageProcessor", keys) | keys
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(filled))
    with pytest.raises(ModelError, match=message):
        read_preprocessing(context, (32, 32))


def test_a_missing_or_damaged_processor_is_an_error_with_a_cure(tmp_path):
    context = _write_config(tmp_path)
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json.*save_pretrained"):
        read_preprocessing(context, (32, 32))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.raises(ModelError, match=r"no image_processor in processor_config\.json"):
        read_preprocessing(context, (32, 32))
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="its image processor can't be loaded"):
        read_preprocessing(context, (32, 32))


def test_no_resizing_takes_pictures_of_the_models_size_only(tmp_path):
    context = _write_config(tmp_path)
    keys = {"do_resize": False, "do_center_crop": False}
    filled = _fill_sizes("CLIPImageProcessor", keys)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(filled))
    config = read_preprocessing(context, (32, 32))
    picture = _draw((32, 32))
    _check_same(preprocess_image(picture, config), _ask_library(tmp_path, picture))
    with pytest.raises(
        DataError, match="of 33 x 32 pixels becomes 33 x 32; the model takes 32 x 32"
    ):
        preprocess_image(_draw((33, 32)), config)


def _save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Node(kind="image_encoder", inputs={}, source=str(folder))


def test_dinov2_reads_pictures_of_its_processors_size(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(**VISION | {"image_size": 64})
    library_model = transformers.Dinov2Model(config).eval()
    library_model.embeddings.position_embeddings.data.normal_()
    for size, count in (({"height": 32, "width": 32}, 16), ({"height": 24, "width": 40}, 15)):
        processor = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=size)
        model = load_model(_save(tmp_path, library_model, processor))
        picture = _draw((70, 51))
        pixels = preprocess_image(picture, model.config["preprocess"])
        _check_same(pixels, _ask_library(tmp_path, picture))
        batch = torch.from_numpy(pixels)[None]
        with torch.no_grad():
            embedding, tokens = model(batch)
            expected = copy.deepcopy(library_model)(pixel_values=batch).last_hidden_state
        assert tokens.shape[1] == 1 + count and model.token_count == 1 + count
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
        assert torch.cosine_similarity(embedding, expected[:, 0]).item() > 0.9999


def test_an_oblong_size_is_followed_where_the_model_takes_it(tmp_path):
    sides = {"height": 16, "width": 40}
    processor = transformers.ViTImageProcessor(size=sides)
    config = ViTConfig(**VISION | {"image_size": (16, 40)})
    library_model = transformers.ViTModel(config).eval()
    model = load_model(_save(tmp_path / "vit", library_model, processor))
    pixels = preprocess_image(_draw((50, 50)), model.config["preprocess"])[None]
    with torch.no_grad():
        tokens = model(torch.from_numpy(pixels))[1]
        expected = library_model(pixel_values=torch.from_numpy(pixels)).last_hidden_state
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    clip = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION))
    with pytest.raises(ModelError, match=r"gives 16 x 40 pixels \(height x width\).*takes 32 x 32"):
        load_model(_save(tmp_path / "clip", clip, processor))
    grey = ViTConfig(**VISION, num_channels=1)
    square = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    with pytest.raises(ModelError, match="num_channels: 1"):
        load_model(_save(tmp_path / "grey", transformers.ViTModel(grey), square))


OPEN_CLIP = {
    "shortest": {"resize_mode": "shortest"},
    "longest": {"resize_mode": "longest"},
    "longest, border": {"resize_mode": "longest", "fill_color": 200},
    "squash": {"resize_mode": "squash"},
    "bilinear": {"interpolation": "bilinear"},
    "values": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    "one value": {"mean": 0.4, "std": 0.3},
    "oblong, shortest": {"size": [24, 40], "interpolation": "bilinear"},
    "oblong, longest": {"size": [24, 40], "resize_mode": "longest"},
    "oblong, squash": {"size": (24, 40), "resize_mode": "squash"},
}
"""Keys of open_clip's `preprocess_cfg`."""


@pytest.mark.parametrize("case", OPEN_CLIP)
def test_pixels_are_those_of_open_clip(case):
    library_config = {"size": 32, **OPEN_CLIP[case]}
    transform = image_transform_v2(PreprocessCfg(**library_config), is_train=False)
    kept = open_clip_family._keep_preprocessing("open_clip:tiny", library_config)
    config = json.loads(json.dumps({**kept, "size": library_config["size"]}))
    for i, size in enumerate(SHAPES):
        picture = _draw(size, i)
        _check_same(preprocess_image(picture, config), transform(picture).numpy())


@pytest.mark.parametrize(
    ("key", "value"), [("interpolation", "random"), ("resize_mode", "stretch"), ("mode", "L")]
)
def test_open_clip_values_that_are_not_followed_are_refused(key, value):
    with pytest.raises(ModelError, match=rf"open_clip:tiny: preprocess_cfg\.{key}: '{value}'"):
        open_clip_family._keep_preprocessing("open_clip:tiny", {key: value})


def _write_open_clip(folder, vision, preprocess):
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    text = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 4, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    clip = CLIP(**config)
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    content = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(content)


TIMM = {
    "timm_model_name": "resnet18",
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "image_size": 32,
}
OBLONG = {"image_size": [16, 40], "patch_size": 8, "width": 32, "layers": 1, "head_width": 8}


@pytest.mark.parametrize("vision", [TIMM, OBLONG], ids=["timm", "oblong"])
@pytest.mark.slow
def test_open_clip_towers_answer_as_the_library(vision, tmp_path):
    import open_clip

    preprocess = {"mean": [0.2, 0.4, 0.3], "std": [0.3] * 3, "interpolation": "bilinear"}
    _write_open_clip(tmp_path / "model", vision, preprocess)
    node = Node(kind="image_encoder", inputs={}, source=str(tmp_path / "model"))
    model = load_model(node)
    name = f"local-dir:{tmp_path / 'model'}"
    library, _, transform = open_clip.create_model_and_transforms(name)
    picture = _draw((61, 47))
    pixels = preprocess_image(picture, model.config["preprocess"])
    expected = transform(picture)
    _check_same(pixels, expected.numpy())
    with torch.no_grad():
        embedding = model(torch.from_numpy(pixels)[None])[0]
        answer = library.eval().encode_image(expected[None])
    assert torch.cosine_similarity(embedding, answer).item() > 0.9999


def _write_bytes(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _write_bytes(_draw((40, 24)), "JPEG", exif=exif, quality=95)


MODES = {
    "grey": _write_bytes(_draw((40, 24)).convert("L"), "PNG"),
    "palette": _write_bytes(_draw((40, 24)).convert("P"), "PNG"),
    "one bit": _write_bytes(_draw((40, 24)).convert("1"), "PNG"),
    "CMYK": _write_bytes(_draw((40, 24)).convert("CMYK"), "JPEG"),
    "YCbCr": _write_bytes(_draw((40, 24)).convert("YCbCr"), "JPEG"),
    "animated": _write_bytes(
        _draw((40, 24)), "GIF", save_all=True, append_images=[_draw((40, 24), 1)]
    ),
    **{f"turned {i}": _turned(i) for i in range(1, 9)},
}
"""Files of kinds that the library opens in the same way."""


@pytest.mark.parametrize("kind", MODES)
def test_a_file_is_opened_as_the_library_opens_it(kind, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(MODES[kind])
    # of the bytes, since the library leaves an animated file open
    expected = np.asarray(load_image(Image.open(io.BytesIO(MODES[kind]))))
    for source in (path, str(path), MODES[kind], bytearray(MODES[kind]), io.BytesIO(MODES[kind])):
        # an open file may be read by two nodes, one after the other
        for _ in range(2):
            assert np.array_equal(np.asarray(open_image(source)), expected)


def test_transparency_falls_on_white():
    half = Image.new("RGBA", (2, 1), (100, 0, 0, 0))
    half.putpixel((1, 0), (100, 50, 0, 255))
    expected = [[[255, 255, 255], [100, 50, 0]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 100, 50, 0])
    palette.putpixel((1, 0), 1)
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 100)
    deep = Image.fromarray(np.array([[7, 100 * 257]], np.uint16))
    files = {
        "RGBA": (_write_bytes(half, "PNG"), expected),
        "palette": (_write_bytes(palette, "PNG", transparency=0), expected),
        "palette of alphas": (_write_bytes(palette, "PNG", transparency=b"\x00\xff"), expected),
        "RGB": (_write_bytes(half.convert("RGB"), "PNG", transparency=(100, 0, 0)), expected),
        "grey": (_write_bytes(grey, "PNG", transparency=7), [[[255] * 3, [100] * 3]]),
        "16 bits": (_write_bytes(deep, "PNG", transparency=7), [[[255] * 3, [100] * 3]]),
        "LA": (_write_bytes(half.convert("LA"), "PNG"), None),
    }
    for kind, (content, pixels) in files.items():
        opened = np.asarray(open_image(content)).tolist()
        assert opened[0][0] == [255] * 3, kind
        assert pixels is None or opened == pixels, kind
    for mode in ("RGBa", "La", "PA"):
        source = half.convert("LA").convert(mode) if mode == "La" else half.convert(mode)
        assert np.asarray(open_image(source))[0, 0].tolist() == [255] * 3, mode


def test_16_bits_and_floats_are_scaled_to_8_bits():
    values = np.array([[0, 257 * 10, 257 * 128, 65535]], np.uint16)
    expected = [[0, 10, 128, 255]]
    sources = {
        "PNG": _write_bytes(Image.fromarray(values), "PNG"),
        "TIFF": _write_bytes(Image.fromarray(values), "TIFF"),
        "I": Image.fromarray(values.astype(np.int32)),
        "I;16B": Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes()),
        "array": values,
        "big-endian array": values.astype(">u2"),
        "F in 0..1": Image.fromarray((np.array(expected) / 255).astype(np.float32)),
        "F in 0..255": Image.fromarray(np.array(expected, np.float32)),
        "F beyond": Image.fromarray(np.array([[-9, 10, 128, 900]], np.float32)),
        "F in 0..1 and a bit beyond": np.array([[-0.02, 10 / 255, 128 / 255, 1.01]]),
        "float array": np.array(expected) / 255,
        "float16 array": (np.array(expected) / 255).astype(np.float16),
        "float array in 0..255": np.array(expected, np.float32),
        "integers": np.array(expected, np.int64),
        "TIFF of floats": _write_bytes(
            Image.fromarray((np.array(expected) / 255).astype(np.float32)), "TIFF"
        ),
    }
    for kind, source in sources.items():
        opened = np.asarray(open_image(source))
        assert opened[..., 0].tolist() == expected and opened.shape == (1, 4, 3), kind


def test_arrays_of_every_layout_are_the_same_picture():
    expected = np.asarray(_draw((21, 15)))
    grey = expected[..., 0]
    alpha = np.dstack([expected, np.full(grey.shape, 255, np.uint8)])
    same = (expected, expected.transpose(2, 0, 1), expected[:, ::-1][:, ::-1], alpha)
    for array in same:
        assert np.array_equal(np.asarray(open_image(array)), expected)
    for array in (grey, grey[..., None], grey[None], np.dstack([grey, alpha[..., 3]])):
        assert np.array_equal(np.asarray(open_image(array))[..., 1], grey)
    assert np.asarray(open_image(grey > 99)).max() == 255


BAD_PICTURES = {
    "NaN": (np.full((4, 4), np.nan), "no finite numbers"),
    "empty": (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]"),
    "five axes": (np.zeros((1, 1, 4, 4, 3), np.uint8), "expected \\[h, w\\] or \\[h, w, 3\\]"),
    "many channels": (np.zeros((9, 9, 9), np.uint8), "expected 1 to 4 channels"),
    "large integers": (np.full((4, 4), 300), "int64 values from 300 to 300"),
    "complex": (np.zeros((4, 4), complex), "type complex128"),
    "-1 to 1": (np.linspace(-1, 1, 16).reshape(4, 4), "from -1 to 1, as of a standardized picture"),
    "standardized": (np.linspace(-2, 2.6, 16).reshape(4, 4), "from -2 to 2.6, as of a standard"),
    "a standardized file": (
        Image.fromarray(np.full((4, 4), -1.5, np.float32)),
        "float32 values from -1.5 to -1.5",
    ),
    "objects": (np.array([["a"]]), "not a readable image"),
    "a list": ([[1, 2]], "a list; give a file, its bytes, an array"),
    "nothing": (None, "a NoneType"),
    "no bytes": (b"", "the given image: not a readable image"),
    "cut": (MODES["grey"][:60], "not a readable image"),
    "a null": ("a\0b", "not a readable image"),
    "a folder": (Path(__file__).parent, "not a readable image"),
    "a file that is not there": (Path("no/such.png"), "such.png: no such image"),
}
"""What is no picture, and the message."""


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_what_is_no_picture_is_a_clear_error(kind):
    source, message = BAD_PICTURES[kind]
    with pytest.raises(DataError, match=message):
        open_image(source)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (20_000, 3)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_memory_is_bounded_for_extreme_shapes(size, mode, monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def watch(image, new_size, *options, **named):
        sizes.append(new_size)
        return resize(image, new_size, *options, **named)

    monkeypatch.setattr(Image.Image, "resize", watch)
    config = {"size": 224, "mean": 0.5, "std": 0.5, "resize_mode": mode}
    pixels = preprocess_image(Image.new("RGB", size, "white"), config)
    assert pixels.shape == (3, 224, 224) and pixels.max() == 1
    assert sizes[0][0] * sizes[0][1] <= images.MAX_RESIZED_PIXELS


@pytest.mark.parametrize("rounding", ["even", "down"])
def test_a_part_that_is_resized_alone_is_the_part_of_the_whole(rounding, monkeypatch):
    picture = _draw((600, 20))

    def preprocess_within(pixels, config):
        monkeypatch.setattr(images, "MAX_RESIZED_PIXELS", pixels)
        return preprocess_image(picture, config)

    for interpolation in images.INTERPOLATIONS:
        config = {"size": 32, "mean": 0.5, "std": 0.5, "interpolation": interpolation}
        config |= {"crop_rounding": rounding, "resize_to": 33}
        whole, alone = (preprocess_within(limit, config) for limit in (10**8, 0))
        # the order of filtering and ties of filters without slopes differ here and there
        assert np.abs(whole - alone).mean() <= BOUND


def test_a_folder_and_a_bundle_see_the_same_pixels(tmp_path):
    from mmcompress.kinds.image_encoder.deployed import ImageEncoder

    rows = []
    for i, kind in enumerate(MODES):
        (tmp_path / f"{i}.img").write_bytes(MODES[kind])
        rows += [{"image": f"{i}.img", "caption": kind, "split": ("train", "val", "test")[i % 3]}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "captions.jsonl").write_text(lines)
    config = {"size": 20, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "lanczos"}
    node = ImageEncoder({"model": None}, {"preprocess": config}, tmp_path)
    for split in ("train", "val", "test"):
        pairs = Folder(path=str(tmp_path)).load(split)
        for name, picture in zip(pairs.names, pairs.inputs, strict=True):
            deployed = node.prepare(tmp_path / name)[0]
            assert np.array_equal(preprocess_image(picture, config), deployed)
    prepared = node.prepare(deployed[None].astype(np.float64))
    assert prepared.dtype == np.float32 and np.array_equal(prepared[0], deployed)
    for wrong in (np.zeros((1, 3, 21, 20), np.float32), np.zeros((1, 20, 20, 3), np.uint8)):
        with pytest.raises(DataError, match=r"prepared ones are float32 \[1, 3, 20, 20\]"):
            node.prepare(wrong)
