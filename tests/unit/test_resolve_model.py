"""What a MODEL argument may be."""

import pytest

from exflow import assets
from exflow.errors import CheckpointError


def make_checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_bundled_name_is_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "_ASSETS", tmp_path)
    folder = make_checkpoint(tmp_path / "pile-moe-top1")
    assert assets.resolve_model("pile-moe-top1") == str(folder)


def test_a_local_folder_is_itself(tmp_path):
    folder = make_checkpoint(tmp_path / "organisation" / "model")
    assert assets.resolve_model(str(folder)) == str(folder)


def test_a_hub_id_is_left_as_it_is():
    assert assets.resolve_model("allenai/OLMoE-1B-7B-0924") == "allenai/OLMoE-1B-7B-0924"


@pytest.mark.parametrize("name", ["pile-moe", "./nowhere/else", "a/b/c", "/nowhere"])
def test_anything_else_lists_what_a_model_may_be(name):
    with pytest.raises(CheckpointError, match="pile-moe-top1, pile-moe-top4"):
        assets.resolve_model(name)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        assets.resolve_model(str(tmp_path))
