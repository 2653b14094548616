"""Models of a hub, from a server on this machine: one commit, every failure told, nothing taken for absent."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from families import TEXT, TOKENIZER, VISION
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from mmcompress.errors import ModelError
from mmcompress.graph.load_spec import load_spec
from mmcompress.models.families import open_clip
from mmcompress.models.hub_files import HubModel, fetch_hub_folder, list_hub_files
from mmcompress.models.shapes import load_shapes_only
from mmcompress.models.sources import (
    fetch_folder,
    list_hub_sources,
    load_model,
    locate_source,
    pin_source,
    pin_sources,
)
from mmcompress.spec.schema import Node
from mmcompress.workspace.context import open_run

SIDE_FILE = "preprocessor_config.json"
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "resample": 2,
    "size": {"height": 32, "width": 32},
}


@dataclass
class FakeHub:
    """What the server has, and how it fails."""

    url: str = ""
    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Folder by commit, by name of the model."""
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    """Commit by branch or tag, by name of the model."""
    failures: dict[str, int] = field(default_factory=dict)
    """Status by name of a file; `listing` stands for that of the files."""
    requests: list[str] = field(default_factory=list)
    """Every request, as `METHOD path`."""
    go_offline: Callable[[], None] | None = None
    """Makes the library use its cache alone."""

    def publish(self, name: str, folder: Path, *, revision: str = "main") -> str:
        """Publish the files of a folder; returns the commit."""
        commit = hashlib.sha1(f"{name} {revision} {len(self.models)}".encode()).hexdigest()
        commit = hashlib.sha1(
            f"{commit}{len(self.refs.get(name, {}))}{folder}".encode()
        ).hexdigest()
        self.models.setdefault(name, {})[commit] = folder
        self.refs.setdefault(name, {})[revision] = commit
        return commit


def make_handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def find_commit(self, name, revision):
            commits = hub.models.get(name)
            if commits is None:
                self.reply(404, b"{}", X_Error_Code="RepoNotFound")
                return None
            commit = hub.refs[name].get(revision, revision)
            if commit not in commits:
                self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
                return None
            return commit

        def do_GET(self):
            path = unquote(self.path.partition("?")[0])
            hub.requests.append(f"{self.command} {path}")
            if path.startswith("/api/models/"):
                self.list_files(path.removeprefix("/api/models/"))
                return
            name, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, file_name = rest.partition("/")
            status = hub.failures.get(file_name)
            if status:
                codes = {403: "GatedRepo", 404: "EntryNotFound"}
                self.reply(status, b"{}", X_Error_Code=codes.get(status, ""))
                return
            commit = self.find_commit(name, revision)
            if commit is None:
                return
            file = hub.models[name][commit] / file_name
            if not file.is_file():
                self.reply(404, b"{}", X_Error_Code="EntryNotFound")
                return
            body = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": commit}
            if self.headers.get("Range"):
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                self.reply(206, body[int(first) : int(last or len(body)) + 1], **headers)
                return
            self.reply(200, body, Content_Length=str(len(body)), **headers)

        do_HEAD = do_GET

        def list_files(self, rest):
            name, _, revision = rest.partition("/revision/")
            if "listing" in hub.failures:
                status = hub.failures["listing"]
                self.reply(status, b"{}", X_Error_Code="RepoNotFound" if status == 401 else "")
                return
            commit = self.find_commit(name, revision or "main")
            if commit is None:
                return
            folder = hub.models[name][commit]
            files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
            answer = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    return Handler


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    """A hub on this machine that holds nothing yet, with caches of its own."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    # The library reads its variables once, when it is imported.
    settings = {
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "own-cache"))
    # the library waits before it asks again
    monkeypatch.setattr("time.sleep", lambda _: None)
    open_clip._load_clip.cache_clear()

    def go_offline():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    hub.go_offline = go_offline
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**VISION)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "README.md").write_text("a model")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**TEXT)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER())
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return folder


def load(source, kind="image_encoder"):
    return load_model(Node(kind=kind, inputs={}, source=source))


def test_a_model_of_the_hub_is_that_of_the_same_folder(hub, vit):
    commit = hub.publish("org/vit", vit)
    pixels = torch.rand(2, 3, 32, 32)
    model = load("transformers:org/vit")
    local = load(f"transformers:{vit}")
    assert torch.equal(model(pixels)[0], local(pixels)[0])
    assert model.config == local.config
    assert model.config["preprocess"]["mean"] == PREPROCESSOR["image_mean"]
    # one commit, and no pickle
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert fetched and all(f"/resolve/{commit}/" in request for request in fetched)
    assert not [request for request in fetched if request.endswith((".bin", ".md"))]


@pytest.mark.parametrize(
    ("file_name", "status", "message"),
    [
        (SIDE_FILE, 500, r"the hub answered 500, a failure of its own: try again later"),
        (SIDE_FILE, 503, r"the hub answered 503, a failure of its own"),
        (SIDE_FILE, 429, r"the hub answered 429, too many requests: wait"),
        (SIDE_FILE, 401, r"the hub answered 401: .*log in \(hf auth login\)"),
        (SIDE_FILE, 403, r"the hub answered 403: its owners ask for consent first"),
        (SIDE_FILE, 404, r"the hub answered 404"),
        (SIDE_FILE, 418, r"the hub answered 418"),
        ("config.json", 500, r"the hub answered 500"),
        ("model.safetensors", 500, r"the hub answered 500"),
        ("model.safetensors", 401, r"the hub answered 401"),
    ],
)
@pytest.mark.examples(2)
def test_a_failure_for_one_file_is_no_absent_file(hub, vit, file_name, status, message):
    hub.publish("org/vit", vit)
    hub.failures[file_name] = status
    with pytest.raises(ModelError, match=rf"hub model 'org/vit': {file_name}: {message}"):
        load("transformers:org/vit")
    # the same source loads once the hub answers again
    hub.failures.clear()
    assert load("transformers:org/vit").config["preprocess"]["mean"] == PREPROCESSOR["image_mean"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, r"the hub answered 500, a failure of its own"),
        (429, r"the hub answered 429, too many requests"),
        (401, r"the hub has no model of this name, or it is private; check the name, or log in"),
        (403, r"the hub answered 403: .*log in"),
    ],
)
@pytest.mark.examples(2)
def test_a_failure_of_the_listing_is_told(hub, vit, status, message):
    hub.publish("org/vit", vit)
    hub.failures["listing"] = status
    with pytest.raises(ModelError, match=rf"hub model 'org/vit': {message}"):
        load("transformers:org/vit")


def test_a_file_that_the_hub_does_not_list_is_absent(hub, vit, tmp_path):
    plain = shutil.copytree(vit, tmp_path / "plain")
    (plain / "preprocessor_config.json").unlink()
    hub.publish("org/plain", plain)
    folder = fetch_hub_folder(HubModel(name="org/plain"))
    assert not (folder / "preprocessor_config.json").exists()
    assert (folder / "model.safetensors").read_bytes() == (vit / "model.safetensors").read_bytes()


def test_a_revision_is_followed_and_pinned_to_its_commit(hub, vit, tmp_path):
    old = hub.publish("org/vit", vit)
    other = tmp_path / "other"
    torch.manual_seed(1)
    ViTModel(ViTConfig(**VISION)).save_pretrained(other)
    (other / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    new = hub.publish("org/vit", other, revision="v2")
    first = load("transformers:org/vit")
    second = load("transformers:org/vit@v2")
    pixels = torch.rand(1, 3, 32, 32)
    assert not torch.equal(first(pixels)[0], second(pixels)[0])
    for source, commit in (
        ("transformers:org/vit", old),
        ("transformers:org/vit@main", old),
        ("transformers:org/vit@v2", new),
        ("hf-hub:org/vit@v2", new),
    ):
        assert pin_source(source) == f"{source.partition('@')[0]}@{commit}"
    # the branch moves on; what is pinned stays
    hub.refs["org/vit"]["main"] = new
    assert torch.equal(load(f"transformers:org/vit@{old}")(pixels)[0], first(pixels)[0])
    assert torch.equal(load("transformers:org/vit")(pixels)[0], second(pixels)[0])
    with pytest.raises(ModelError, match=r"the hub has no revision 'v3' of it; check the branch"):
        load("transformers:org/vit@v3")
    # a commit needs no hub once its files are here
    hub.requests.clear()
    load(f"transformers:org/vit@{old}")
    assert hub.requests == []


def test_without_a_connection_a_cached_model_loads_as_before(hub, vit, monkeypatch):
    commit = hub.publish("org/vit", vit)
    load("transformers:org/vit")
    for failure in (500, 429):
        hub.failures = {"listing": failure}
        assert load("transformers:org/vit").blocks
    hub.failures = {}
    hub.go_offline()
    assert load("transformers:org/vit").config["preprocess"]["mean"] == PREPROCESSOR["image_mean"]
    assert pin_source("transformers:org/vit") == f"transformers:org/vit@{commit}"
    [folder] = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config.json: the hub can't be reached"):
        load("transformers:org/vit")
    with pytest.raises(ModelError, match=r"'org/other': the hub can't be reached and no copy"):
        load("transformers:org/other")


def test_a_copy_that_another_tool_left_is_used_only_if_it_says_what_is_absent(
    hub, bert, monkeypatch
):
    """What `AutoModel` alone leaves in the cache does not say how sentences are pooled."""
    from huggingface_hub import hf_hub_download

    hub.publish("org/bert", bert)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        hf_hub_download("org/bert", name, endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE)
    hub.go_offline()
    with pytest.raises(
        ModelError, match=r"does not tell whether \w+.json exists\..*source: /"
    ) as error:
        load("transformers:org/bert", "text_encoder")
    assert load(str(error.value).partition("source: ")[2], "text_encoder").blocks


def test_modules_of_sentence_transformers_come_along(hub, bert):
    hub.publish("org/bert", bert)
    folder = fetch_hub_folder(HubModel(name="org/bert"))
    assert json.loads((folder / "1_Pooling/config.json").read_text())["pooling_mode_cls_token"]


def test_open_clips_own_syntax_names_a_model_at_the_hub(hub, tiny, tmp_path):
    commit = hub.publish("org/clip", tiny / "clip")
    local = load(str(tiny / "clip"))
    pixels = torch.rand(1, 3, 32, 32)
    for source in (
        "hf-hub:org/clip",
        "hf-hub:org/clip@main",
        "open_clip:hf-hub:org/clip",
        f"open_clip:hf-hub:org/clip@{commit}",
    ):
        assert torch.equal(load(source)(pixels)[0], local(pixels)[0]), source
        assert load(source, "text_encoder").tokenizer_json
    for prefix in ("local-dir:", "open_clip:local-dir:"):
        assert locate_source(f"{prefix}{tiny / 'clip'}").folder == tiny / "clip"
    text = (
        (tiny / "spec.yaml").read_text().replace("source: ./clip", "source: hf-hub:org/clip@main")
    )
    (tmp_path / "spec.yaml").write_text(text.replace("./captioner", str(tiny / "captioner")))
    spec = load_spec(tmp_path / "spec.yaml")
    # nothing is glued to it
    assert spec.nodes["vision"].source == "hf-hub:org/clip@main"
    pinned, sources = pin_sources(spec, {})
    assert sources == {"hf-hub:org/clip@main": f"hf-hub:org/clip@{commit}"}
    assert list_hub_sources(pinned) == {
        "vision": f"hf-hub:org/clip@{commit}",
        "text": f"hf-hub:org/clip@{commit}",
    }
    # known ones are taken without asking
    assert (
        pin_sources(spec, {"hf-hub:org/clip@main": "hf-hub:org/clip@" + "0" * 40})[0]
        .nodes["vision"]
        .source.endswith("0" * 40)
    )
    hub.failures["tokenizer.json"] = 500
    shutil.rmtree(constants.HF_HUB_CACHE)
    open_clip._load_clip.cache_clear()
    with pytest.raises(ModelError, match=r"'org/clip': tokenizer.json: the hub answered 500"):
        load("hf-hub:org/clip", "text_encoder")


@pytest.mark.slow
def test_weights_behind_a_tag_of_open_clip_never_turn_into_a_pickle(hub, tmp_path):
    """open_clip takes a failure for an absent .safetensors, and goes on with the .bin."""
    name = "timm/vit_base_patch32_clip_224.openai"
    folder = tmp_path / "tagged"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"a pickle")
    hub.publish(name, folder)
    hub.failures["open_clip_model.safetensors"] = 500
    with pytest.raises(ModelError, match=r"open_clip_model.safetensors: the hub answered 500"):
        load("open_clip:ViT-B-32@openai")
    assert not [request for request in hub.requests if request.endswith(".bin")]
    hub.requests.clear()
    with load_shapes_only():
        tower = load("open_clip:ViT-B-32@openai")
    assert tower.config["preprocess"]["mean"][0] == pytest.approx(0.48145466)
    assert not [request for request in hub.requests if "/resolve/" in request]
    with pytest.raises(ModelError, match=r"'opnai' is no file and no tag .*did you mean 'openai'"):
        load("open_clip:ViT-B-32@opnai")


def test_validation_fetches_headers_and_no_weights(hub, vit, tmp_path, tiny):
    hub.publish("org/vit", vit)
    hub.publish("org/clip", tiny / "clip")
    with load_shapes_only():
        model = load("transformers:org/vit")
        tower = load("hf-hub:org/clip")
    whole = load(f"transformers:{vit}")
    assert model.config == whole.config and model.blocks == whole.blocks
    assert tower.dims == load(str(tiny / "clip")).dims
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    # weights that do not fit are found in their headers
    other = shutil.copytree(vit, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    hub.publish("org/other", other)
    with load_shapes_only(), pytest.raises(ModelError, match=r"of another shape: .*mlp"):
        load("transformers:org/other")


def test_a_model_of_pickles_or_of_an_adapter_is_refused_before_its_weights_come(hub, vit, tmp_path):
    pickles = shutil.copytree(vit, tmp_path / "pickles")
    (pickles / "model.safetensors").unlink()
    hub.publish("org/pickles", pickles)
    with pytest.raises(ModelError, match=r"has no model.safetensors \(only pytorch_model.bin"):
        load("transformers:org/pickles")
    quantized = shutil.copytree(vit, tmp_path / "quantized")
    (quantized / "quantize_config.json").write_text("{}")
    hub.publish("org/quantized", quantized)
    with pytest.raises(ModelError, match=r"quantized by gptq"):
        load("transformers:org/quantized")
    assert not [r for r in hub.requests if "quantized" in r and r.endswith(".safetensors")]


def test_a_run_keeps_the_commit_and_goes_on_with_it(hub, tiny, tmp_path, machine):
    commit = hub.publish("org/clip", tiny / "clip")
    text = (tiny / "spec.yaml").read_text().replace("source: ./clip", "source: hf-hub:org/clip")
    (tmp_path / "spec.yaml").write_text(text.replace("./captioner", str(tiny / "captioner")))
    run = open_run(tmp_path / "spec.yaml", tmp_path / "run", **machine)
    pinned = f"hf-hub:org/clip@{commit}"
    assert run.spec.nodes["vision"].source == run.spec.nodes["text"].source == pinned
    assert json.loads(run.folder.spec.read_text())["nodes"]["vision"]["source"] == pinned
    assert json.loads(run.folder.sources.read_text()) == {"hf-hub:org/clip": pinned}
    run.write_bundle(run.models, {}, kept={}, folder=tmp_path / "bundle", prove=False)
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["sources"] == {"vision": pinned, "text": pinned}
    # the branch moves on, and the hub goes away: the run stays with its commit
    hub.publish("org/clip", tmp_path / "nothing")
    hub.failures["listing"] = 500
    hub.requests.clear()
    resumed = open_run(tmp_path / "spec.yaml", tmp_path / "run", resume=True, **machine)
    assert resumed.spec == run.spec and hub.requests == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("transformers:org/vit@", r"a branch, tag or commit is missing behind the @"),
        ("hf-hub:", r"no name that the hub may have"),
        ("transformers:a/b/c", r"no such folder, and no name that the hub may have"),
        ("transformers:org/na me", r"no name that the hub may have"),
        ("hf-hub:./clip", r"no name that the hub may have"),
        ("transformers:" + "a" * 5000, r"no name that the hub may have"),
        ("local-dir:./nowhere", r"no such folder"),
        ("org/vit", r"no such folder .*; for a model of the hub: transformers:org/vit"),
        ("hf_hub:org/vit", r"unknown kind 'hf_hub'; did you mean 'hf-hub:'"),
    ],
)
def test_a_source_that_names_no_model_is_told(source, message):
    with pytest.raises(ModelError, match=message) as caught:
        fetch_folder(locate_source(source))
    assert len(str(caught.value)) < 400


def test_a_damaged_listing_in_the_cache_is_made_again(hub, vit, tmp_path):
    hub.publish("org/vit", vit)
    listing = list_hub_files(HubModel(name="org/vit"))
    kept = list((tmp_path / "own-cache").rglob("*.json"))
    assert len(kept) == 2
    for path in kept:
        path.write_text('{"commit": 3')
    assert list_hub_files(HubModel(name="org/vit", revision=listing.commit)) == listing


@pytest.fixture()
def tiny_tag(tiny, tmp_path, monkeypatch):
    """A small model on open_clip's list, whose tag `made` names a model at the hub."""
    from open_clip import factory, pretrained

    config = json.loads((tiny / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny-CLIP", config)
    tags = {"made": {"hf_hub": "org/tiny/", "mean": [0.25] * 3, "std": [0.5] * 3}}
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny-CLIP", tags)
    other = tmp_path / "other"
    shutil.copytree(tiny / "clip", other)
    path = other / "open_clip_model.safetensors"
    weights = {name: tensor * 0.5 for name, tensor in load_file(path).items()}
    save_file(weights, path)
    return "open_clip:Tiny-CLIP@made", other


def test_weights_behind_a_tag_of_open_clip_are_pinned_to_their_commit(
    hub, tiny, tmp_path, tiny_tag
):
    source, other = tiny_tag
    first = hub.publish("org/tiny", tiny / "clip")
    assert pin_source(source) == f"{source}@{first}"
    pixels = torch.rand(1, 3, 32, 32)
    expected = load(str(tiny / "clip"))(pixels)[0]
    tower = load(f"{source}@main")
    assert torch.equal(tower(pixels)[0], expected)
    # what the tag says of pictures counts, too
    assert tower.config["preprocess"]["mean"] == [0.25] * 3
    second = hub.publish("org/tiny", other)
    assert second != first and pin_source(source) == f"{source}@{second}"
    open_clip._load_clip.cache_clear()
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert torch.equal(load(f"{source}@{first}")(pixels)[0], expected)
    assert not torch.equal(load(f"{source}@{second}")(pixels)[0], expected)
    text = (tiny / "spec.yaml").read_text().replace("./captioner", str(tiny / "captioner"))
    text = text.replace("source: ./clip", f"source: {source}", 1)
    (tmp_path / "spec.yaml").write_text(text.replace("./clip", str(tiny / "clip")))
    spec = load_spec(tmp_path / "spec.yaml")
    pinned, sources = pin_sources(spec, {})
    assert sources == {source: f"{source}@{second}"}
    assert list_hub_sources(pinned) == {"vision": f"{source}@{second}"}
    with pytest.raises(ModelError, match="the hub has no revision 'v9' of it"):
        load(f"{source}@v9")


def test_a_cached_tag_of_open_clip_needs_no_connection(hub, tiny, tiny_tag, monkeypatch):
    source, _ = tiny_tag
    commit = hub.publish("org/tiny", tiny / "clip")
    load(source)
    open_clip._load_clip.cache_clear()
    hub.requests.clear()
    hub.go_offline()
    assert pin_source(source) == f"{source}@{commit}"
    assert load(f"{source}@{commit}").blocks and not hub.requests
