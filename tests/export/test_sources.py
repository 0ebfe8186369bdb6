import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from isthmus.errors import ModelError
from isthmus.export import sources
from isthmus.export.sources import resolve_model

NAME = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever asks for a download without saying what comes fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a download was started")

    monkeypatch.setattr(sources, "pull", refuse)
    for function in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, function, refuse)


class Hub:
    """A hub with one repository; records the options of each download."""

    def __init__(self, folder):
        self.folder = folder
        self.files = []
        self.error = None
        self.options = []

    def snapshot_download(self, model, **options):
        self.options.append(options)
        if self.error:
            raise self.error
        for name in self.files:
            if name.endswith((".safetensors", ".json")):
                (self.folder / name).write_text("")
        return str(self.folder)

    def hf_hub_download(self, model, name, **options):
        self.options.append(options)
        return str(self.folder / name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    state = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", state.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", state.hf_hub_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, model: state.files)
    return state


def test_directory_and_file_are_taken_as_they_are(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(file)) == file


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"")
    assert resolve_model("~/model.gguf") == tmp_path / "model.gguf"


def test_catalog_name_is_pulled(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "pull", lambda name, *, cache, progress: cache / name)
    assert resolve_model(NAME, cache=tmp_path) == tmp_path / NAME


def test_catalog_name_offline_is_taken_from_the_cache_only(monkeypatch, tmp_path):
    with pytest.raises(ModelError, match=f"run `isthmus pull {NAME}`"):
        resolve_model(NAME, cache=tmp_path, offline=True)
    monkeypatch.setattr(sources, "cached_path", lambda name, *, cache: cache / name)
    assert resolve_model(NAME, cache=tmp_path, offline=True) == tmp_path / NAME


@pytest.mark.parametrize("model", ["smollm2", "smollm2-135m-instuct", "SmolLM2-135M-Instruct"])
def test_misspelt_catalog_name_is_answered_with_the_right_one(model):
    with pytest.raises(ModelError, match=f"did you mean {NAME}"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["", "zzz", "missing/model.gguf", "./owner/name", "a/b/c", "owner/"])
def test_unknown_model_lists_what_was_tried(model):
    with pytest.raises(ModelError, match=r"no such directory or \.gguf file, not in the catalog"):
        resolve_model(model)


def test_hub_id_gives_a_snapshot_of_safetensors_without_duplicates(hub, tmp_path):
    hub.files = ["config.json", "model.safetensors", "model.Q4_0.gguf"]
    assert resolve_model("owner/name") == tmp_path
    (options,) = hub.options
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("gguf" in pattern or "bin" in pattern for pattern in options["allow_patterns"])
    assert "original/*" in options["ignore_patterns"]
    assert options["cache_dir"] is None and options["local_files_only"] is False


def test_hub_repository_with_one_gguf_file_gives_that_file(hub, tmp_path):
    hub.files = ["config.json", "model.Q4_0.gguf", "README.md"]
    assert resolve_model("owner/name-GGUF", cache=tmp_path) == tmp_path / "model.Q4_0.gguf"
    assert [options["cache_dir"] for options in hub.options] == [tmp_path / "hub"] * 2


def test_hub_repository_with_several_gguf_files_asks_for_one(hub):
    hub.files = ["a.gguf", "b.gguf"]
    with pytest.raises(ModelError, match=r"2 GGUF files .*\(a\.gguf, b\.gguf\); download one"):
        resolve_model("owner/name-GGUF")


def test_hub_id_offline_uses_local_files_only(hub, tmp_path):
    (tmp_path / "one.gguf").write_bytes(b"")
    assert resolve_model("owner/name", offline=True) == tmp_path / "one.gguf"
    assert [options["local_files_only"] for options in hub.options] == [True, True]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no connection"),
        HfHubHTTPError.__bases__[0]("refused"),
        HFValidationError("bad id"),
        OSError("disk"),
    ],
)
def test_hub_failure_is_a_model_error(hub, error):
    hub.error = error
    with pytest.raises(ModelError, match=r"owner/name: no such directory, .* check the name"):
        resolve_model("owner/name")
