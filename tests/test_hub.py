"""Checkpoints on the Hub: huggingface_hub's own client, in processes of its own, against a Hub inside this one."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hub_client
import pytest
from hub_client import Client
from hub_server import LocalHub
from tiny import tiny_model
from tiny_prime import prime_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tdlm import VocabTree
from tdlm.tokenization import train_tokenizer

TRUST = {"trust_remote_code": True}
TOKENS = {"hf_of_acme": "acme", "hf_of_another": "another"}
DOWNLOADS = r"^/storage/|/resolve/"


class Checkpoint(NamedTuple):
    folder: str
    weights: str


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Checkpoint(str(folder), hub_client.weights_of(model))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to merge, some words to keep"] * 3, 270, progress=False)


@pytest.fixture(scope="module")
def tree(tokenizer) -> VocabTree:
    return VocabTree.random(len(tokenizer), 8, seed=0).bind(tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tree, tokenizer, tmp_path_factory) -> Checkpoint:
    return save(tiny_model(tree, max_position_embeddings=32), tokenizer, tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def large(tree, tokenizer, tmp_path_factory) -> Checkpoint:
    """Larger than the 10 MB pieces in which the client reads, or an interrupted download has nothing to resume."""
    return save(tiny_model(tree, seed=1, hidden_size=384), tokenizer, tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["entirely different text to merge here"] * 3, 270, progress=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub"), TOKENS) as hub:
        yield hub


class Clients(NamedTuple):
    owner: Client
    stranger: Client
    stranger_home: Path


@pytest.fixture(scope="module")
def clients(hub, tmp_path_factory) -> Iterator[Clients]:
    """Both at once: importing takes them seconds."""
    homes = [tmp_path_factory.mktemp(name) for name in ("owner", "stranger")]
    owner = Client(hub.endpoint, homes[0], token="hf_of_acme")
    stranger = Client(hub.endpoint, homes[1], has_tdlm=False)
    yield Clients(owner, stranger, homes[1])
    owner.close()
    stranger.close()


@pytest.fixture(scope="module")
def owner(clients) -> Client:
    """Has tdlm and acme's token."""
    return clients.owner


@pytest.fixture(scope="module")
def stranger(clients) -> Client:
    """Has neither."""
    return clients.stranger


@pytest.fixture(scope="module")
def commit(owner, checkpoint) -> str:
    """The commit in which `checkpoint` was pushed to acme/tree."""
    return owner.run(hub_client.push, checkpoint.folder, "acme/tree")


# ---- push ----


def test_a_push_with_the_tokenizer_is_one_commit_with_all_that_loading_needs(hub, commit, checkpoint):
    assert hub.titles("acme/tree") == ["initial commit", "Upload model"]
    pushed = hub.repositories["acme/tree"].find(commit).files
    saved = {path.name for path in Path(checkpoint.folder).iterdir()}
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "modeling_tdlm.py"} <= saved
    assert set(pushed) == saved | {"README.md"}
    assert pushed["model.safetensors"].is_large


def test_a_push_without_tokenizer_is_transformers_own(hub, owner, checkpoint):
    commit = owner.run(hub_client.push_model_alone, checkpoint.folder, "acme/alone", "a-tag")
    files = hub.repositories["acme/alone"].find(commit).files
    assert {"model.safetensors", "modeling_tdlm.py"} <= set(files)
    assert "tokenizer.json" not in files
    assert "- a-tag" in hub.object_path(files["README.md"].oid).read_text()


def test_a_second_push_keeps_the_card_and_adds_tags_to_it(hub, owner, checkpoint):
    owner.run(hub_client.push, checkpoint.folder, "acme/card")
    card = b"---\ntags: [mine]\n---\nWritten by hand.\n"
    owner.run(hub_client.call_hub, "upload_file", path_or_fileobj=card, path_in_repo="README.md", repo_id="acme/card")
    commit = owner.run(hub_client.push, checkpoint.folder, "acme/card", tags=["more"])
    text = hub.object_path(hub.repositories["acme/card"].find(commit).files["README.md"].oid).read_text()
    assert "Written by hand." in text
    assert "- mine\n- more" in text


def test_a_tokenizer_that_is_not_the_trees_is_not_pushed(hub, owner, checkpoint, other_tokenizer):
    with pytest.raises(ValueError, match="built for another tokenizer"):
        owner.run(hub_client.push, checkpoint.folder, "acme/wrong", tokenizer_folder=other_tokenizer)
    assert "acme/wrong" not in hub.repositories


def test_nobody_pushes_without_the_owners_token(hub, stranger, owner, checkpoint, commit):
    with pytest.raises(OSError, match="401"):
        stranger.run(hub_client.push_tokenizer, checkpoint.folder, "acme/tree")
    with pytest.raises(OSError, match="403"):
        stranger.run(hub_client.push_tokenizer, checkpoint.folder, "acme/tree", token="hf_of_another")
    assert hub.titles("acme/tree")[-1] == "Upload model"


# ---- load ----


def test_a_stranger_uses_every_auto_class_by_repository_name(stranger, commit, checkpoint):
    classes, text = stranger.run(hub_client.use_every_auto_class, "acme/tree", **TRUST)
    assert classes == ["TDLMConfig", "TDLMModel", "TDLMForDiffusionLM"]
    assert text.startswith("some words")
    loaded = stranger.run(hub_client.load, "acme/tree", **TRUST)
    assert loaded == (f"transformers_modules.acme.tree.{commit}.modeling_tdlm", checkpoint.weights)


def test_a_stranger_uses_a_model_of_digits_too(owner, stranger, tokenizer, tmp_path):
    prime = save(prime_model(len(tokenizer)), tokenizer, tmp_path)
    owner.run(hub_client.push, prime.folder, "acme/prime")
    classes, _ = stranger.run(hub_client.use_every_auto_class, "acme/prime", **TRUST)
    assert classes == ["MDMPrimeConfig", "MDMPrimeModel", "MDMPrimeForDiffusionLM"]
    assert stranger.run(hub_client.load, "acme/prime", **TRUST).weights == prime.weights


def test_installed_classes_load_without_the_repositorys_code(hub, owner, commit, checkpoint):
    asked = len(hub.asked("GET", r"\.py$"))
    assert owner.run(hub_client.load, "acme/tree") == ("tdlm.modeling_tdlm", checkpoint.weights)
    classes, _ = owner.run(hub_client.use_every_auto_class, "acme/tree")
    assert classes == ["TDLMConfig", "TDLMModel", "TDLMForDiffusionLM"]
    assert len(hub.asked("GET", r"\.py$")) == asked


def test_without_trust_no_code_is_fetched_or_run(hub, owner, stranger, checkpoint):
    owner.run(hub_client.push, checkpoint.folder, "acme/untrusted")
    for trust in ({}, {"trust_remote_code": False}):
        with pytest.raises(ValueError, match=r"acme/untrusted contains custom code[\s\S]*`trust_remote_code=True`"):
            stranger.run(hub_client.load, "acme/untrusted", **trust)
    assert not hub.asked("GET", r"^/acme/untrusted/.*\.py$")
    assert not stranger.run(hub_client.modules_of, "untrusted")
    stranger.run(hub_client.load, "acme/untrusted", **TRUST)  # the same two would be seen
    assert hub.asked("GET", r"^/acme/untrusted/.*\.py$")
    assert stranger.run(hub_client.modules_of, "untrusted")


def test_a_revision_is_a_commit_a_branch_or_a_tag(owner, stranger, large, checkpoint):
    first = owner.run(hub_client.push, checkpoint.folder, "acme/history")
    owner.run(hub_client.call_hub, "create_tag", "acme/history", tag="v1")
    owner.run(hub_client.push, large.folder, "acme/history", revision="next")
    second = owner.run(hub_client.push, large.folder, "acme/history")
    expected = {first: checkpoint, "v1": checkpoint, "next": large, second: large, "main": large}
    for revision, pushed in expected.items():
        loaded = stranger.run(hub_client.load, "acme/history", revision=revision, **TRUST)
        assert loaded.weights == pushed.weights, revision
    with pytest.raises(OSError, match="v2 is not a valid git identifier"):
        stranger.run(hub_client.load, "acme/history", revision="v2", **TRUST)


def test_a_second_load_downloads_nothing(hub, stranger, commit, checkpoint):
    stranger.run(hub_client.load, "acme/tree", **TRUST)
    asked = len(hub.asked("GET", DOWNLOADS))
    assert stranger.run(hub_client.load, "acme/tree", **TRUST).weights == checkpoint.weights
    assert len(hub.asked("GET", DOWNLOADS)) == asked


def test_a_pulled_folder_loads_as_a_local_one(stranger, commit, checkpoint, tmp_path):
    folder = stranger.run(hub_client.pull, "acme/tree", local_dir=str(tmp_path))
    assert stranger.run(hub_client.load, folder, **TRUST).weights == checkpoint.weights


def test_a_loaded_repository_works_offline(clients, stranger, commit, checkpoint):
    stranger.run(hub_client.use_every_auto_class, "acme/tree", **TRUST)
    nowhere = "http://127.0.0.1:9"  # the discard port: no Hub, no server
    offline = Client(nowhere, clients.stranger_home, has_tdlm=False, offline=True)
    try:
        assert offline.run(hub_client.load, "acme/tree", **TRUST).weights == checkpoint.weights
        _, text = offline.run(hub_client.use_every_auto_class, "acme/tree", **TRUST)
        assert text.startswith("some words")
        with pytest.raises(OSError, match="offline mode"):
            offline.run(hub_client.load, "acme/never-loaded", **TRUST)
    finally:
        offline.close()


def test_sharded_weights_come_back_with_their_tree(hub, owner, stranger, large):
    commit = owner.run(hub_client.push, large.folder, "acme/sharded", max_shard_size="4MB")
    shards = [path for path in hub.repositories["acme/sharded"].find(commit).files if path.endswith(".safetensors")]
    assert len(shards) > 2
    assert stranger.run(hub_client.load, "acme/sharded", **TRUST).weights == large.weights


def test_a_private_repository_needs_its_owners_token(hub, owner, stranger, checkpoint):
    owner.run(hub_client.push, checkpoint.folder, "acme/private", private=True)
    assert hub.repositories["acme/private"].private
    for token in (None, "hf_of_another"):
        with pytest.raises(OSError, match=r"private repository, make sure to pass a token"):
            stranger.run(hub_client.load, "acme/private", token=token, **TRUST)
    loaded = stranger.run(hub_client.load, "acme/private", token="hf_of_acme", **TRUST)
    assert loaded.weights == checkpoint.weights


@pytest.mark.parametrize("name", ["model.safetensors", "heads_tdlm.py", "config.json"])
def test_a_missing_file_is_named(name, owner, stranger, commit):
    branch = f"without-{name}"
    owner.run(hub_client.call_hub, "create_branch", "acme/tree", branch=branch, revision=commit)
    owner.run(hub_client.call_hub, "delete_file", name, "acme/tree", revision=branch)
    with pytest.raises((OSError, ValueError), match=name):
        stranger.run(hub_client.load, "acme/tree", revision=branch, **TRUST)


def test_a_missing_tokenizer_is_no_obstacle_to_the_model(owner, stranger, commit, checkpoint):
    owner.run(hub_client.call_hub, "create_branch", "acme/tree", branch="no-tokenizer", revision=commit)
    owner.run(hub_client.call_hub, "delete_file", "tokenizer.json", "acme/tree", revision="no-tokenizer")
    loaded = stranger.run(hub_client.load, "acme/tree", revision="no-tokenizer", **TRUST)
    assert loaded.weights == checkpoint.weights


def test_a_tree_beside_another_tokenizer_is_refused_at_that_revision_alone(
    owner, stranger, commit, checkpoint, other_tokenizer
):
    owner.run(hub_client.push_tokenizer, other_tokenizer, "acme/tree", revision="mixed")
    with pytest.raises(ValueError, match="built for another tokenizer"):
        stranger.run(hub_client.load, "acme/tree", revision="mixed", **TRUST)
    with pytest.raises(ValueError, match="built for another tokenizer"):
        owner.run(hub_client.load, "acme/tree", revision="mixed")
    assert stranger.run(hub_client.load, "acme/tree", revision=commit, **TRUST).weights == checkpoint.weights


# ---- interruptions ----


def test_an_interrupted_push_leaves_the_previous_commit(hub, owner, stranger, checkpoint, large):
    owner.run(hub_client.push, checkpoint.folder, "acme/cut")
    with hub.cutting("POST", "^/api/models/acme/cut/commit/", after_bytes=1000, times=1) as cut:
        with pytest.raises(Exception, match=r"(?i)disconnected|reset|broken pipe"):
            owner.run(hub_client.push, large.folder, "acme/cut")
        assert cut.done == 1
    assert hub.titles("acme/cut") == ["initial commit", "Upload model"]
    assert stranger.run(hub_client.load, "acme/cut", **TRUST).weights == checkpoint.weights
    uploads = len(hub.asked("PUT", "^/storage/"))
    owner.run(hub_client.push, large.folder, "acme/cut")
    assert len(hub.asked("PUT", "^/storage/")) == uploads, "the weights had arrived"
    assert hub.titles("acme/cut") == ["initial commit", "Upload model", "Upload model"]
    assert stranger.run(hub_client.load, "acme/cut", **TRUST).weights == large.weights


def test_weights_whose_upload_breaks_off_are_sent_again(hub, owner, stranger, tree, tokenizer, tmp_path):
    unseen = save(tiny_model(tree, seed=2, hidden_size=384), tokenizer, tmp_path)
    with hub.cutting("PUT", "^/storage/", after_bytes=2**20, times=1) as cut:
        owner.run(hub_client.push, unseen.folder, "acme/resent")
        assert cut.done == 1
    assert hub.titles("acme/resent") == ["initial commit", "Upload model"]
    assert stranger.run(hub_client.load, "acme/resent", **TRUST).weights == unseen.weights


def test_an_interrupted_download_resumes(hub, owner, stranger, tree, tokenizer, tmp_path):
    unseen = save(tiny_model(tree, seed=3, hidden_size=384), tokenizer, tmp_path)
    owner.run(hub_client.push, unseen.folder, "acme/resumed")
    with hub.cutting("GET", "^/storage/", after_bytes=11 * 2**20, times=1) as cut:
        loaded = stranger.run(hub_client.load, "acme/resumed", **TRUST)
        assert cut.done == 1
    assert hub.asked("GET", "^/storage/")[-1].headers["Range"] == f"bytes={10 * 2**20}-"
    assert loaded.weights == unseen.weights


def test_after_a_failed_download_the_next_load_is_whole(hub, owner, stranger, tree, tokenizer, tmp_path):
    unseen = save(tiny_model(tree, seed=4, max_position_embeddings=32), tokenizer, tmp_path)
    owner.run(hub_client.push, unseen.folder, "acme/failed")
    tries = 6  # the client's own: the first and five more, a second apart
    with hub.cutting("GET", "^/storage/", after_bytes=1000, times=tries) as cut:
        with pytest.raises(OSError, match="Can't load the model for 'acme/failed'"):
            stranger.run(hub_client.load, "acme/failed", **TRUST)
        assert cut.done == tries
    assert stranger.run(hub_client.load, "acme/failed", **TRUST).weights == unseen.weights


# ---- the Trainer ----


def test_every_push_of_the_trainer_is_all_that_a_stranger_needs(hub, owner, stranger, checkpoint, tmp_path):
    owner.run(hub_client.train, checkpoint.folder, "acme/trained", str(tmp_path))
    assert hub.titles("acme/trained") == ["initial commit", "Training in progress, step 1", "End of training"]
    for commit in hub.repositories["acme/trained"].commits[1:]:
        needed = {"generation_config.json", "tokenizer.json", "modeling_tdlm.py", "model.safetensors", "README.md"}
        assert needed <= set(commit.files), commit.title
        assert not [path for path in commit.files if path.startswith("checkpoint-")]
        classes, _ = stranger.run(hub_client.use_every_auto_class, "acme/trained", revision=commit.oid, **TRUST)
        assert classes == ["TDLMConfig", "TDLMModel", "TDLMForDiffusionLM"]
    printed = stranger.run(hub_client.run_snippet_of_card, "acme/trained")
    assert "tensor([" in printed  # the bound


def test_the_client_asked_for_nothing_that_this_hub_does_not_know(hub, commit):
    """Last: an answer of 404 to what the Hub does have would be no test of anything."""
    assert not hub.unknown
