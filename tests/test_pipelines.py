"""transformers' text-generation pipeline, the infilling pipeline, and what a terminal shows of a generation."""

import json
from pathlib import Path

import pytest
import torch
from test_remote_code import in_a_stranger
from tiny import tiny_model
from tiny_prime import prime_model
from transformers import AutoTokenizer, TextDiffusionStreamer, TextStreamer, pipeline

from tdlm import TDLMGenerationConfig, TDLMInfillingPipeline, TreeTextStreamer, VocabTree
from tdlm.tokenization import train_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
MESSAGES = [{"role": "user", "content": "The cat?"}]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["The cat sat on the mat. The dog sat on the log."] * 3, 280, progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    tree = VocabTree.random(len(tokenizer), 8, seed=0).bind(tokenizer)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return tiny_model(tree, max_position_embeddings=32, **special)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(folder):
    return pipeline("text-generation", model=str(folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def fill(model, tokenizer):
    return TDLMInfillingPipeline(model=model, tokenizer=tokenizer)


# ---- text generation ----


def test_text_generation_continues_a_prompt(generator, tokenizer):
    full = generator("The cat", max_new_tokens=5, num_denoising_steps=3)
    assert full[0]["generated_text"].startswith("The cat")
    options = {"max_new_tokens": 5, "eos_token_id": None}
    new = generator("The cat", return_full_text=False, return_dict_in_generate=True, **options)
    assert not new[0]["generated_text"].startswith("The cat") and len(new[0]["order"]) == 5 + len(
        tokenizer("The cat")["input_ids"]
    )
    ids = generator("The cat", return_tensors=True, **options)[0]["generated_token_ids"]
    assert len(ids) == 5 + len(tokenizer("The cat")["input_ids"])


def test_text_generation_takes_batches_of_unequal_prompts(generator):
    prompts = ["The cat sat on", "The", "The dog"]
    alone = [generator(p, max_new_tokens=4, do_sample=False, num_denoising_steps=3)[0] for p in prompts]
    together = generator(prompts, max_new_tokens=4, do_sample=False, num_denoising_steps=3, batch_size=3)
    assert [record for (record,) in together] == alone
    many = generator("The", max_new_tokens=4, num_return_sequences=3)
    assert len(many) == 3 and all(record["generated_text"].startswith("The") for record in many)


def test_text_generation_needs_no_prompt_and_outgrows_the_context(generator):
    assert isinstance(generator("", max_new_tokens=4)[0]["generated_text"], str)
    # The pipeline's own default of 256 new tokens is eight times the context.
    ids = generator("The", return_tensors=True, eos_token_id=None)[0]["generated_token_ids"]
    assert len(ids) > 256


def test_text_generation_answers_chats(generator, tokenizer):
    answer = generator(MESSAGES, max_new_tokens=4)[0]["generated_text"]
    assert answer[:1] == MESSAGES and answer[1]["role"] == "assistant"
    assert "user: The cat?" in tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_text_generation_stops_at_a_stop_sequence(generator):
    text = generator("The cat", max_new_tokens=30, stop_sequence="a", temperature=5.0, return_full_text=False)
    assert text[0]["generated_text"].count("a") <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 3}, "num_beams=3 is not supported by diffusion generation"),
        ({"assistant_model": "gpt2"}, r"does not know: \['assistant_model'\]"),
        ({"use_cache": True}, "use_cache=True is not supported"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 is not supported"),
    ],
)
def test_what_only_autoregressive_models_do_is_refused(generator, arguments, message):
    with pytest.raises(ValueError, match=message):
        generator("The", max_new_tokens=3, **arguments)


def test_a_given_generation_config_falls_back_on_the_models(model):
    """As in transformers: what it does not say is taken from `model.generation_config`."""
    model.generation_config.num_denoising_steps = 5
    try:
        config = TDLMGenerationConfig(max_new_tokens=4, return_dict_in_generate=True)
        assert model.generate(generation_config=config).num_forwards == 5
    finally:
        model.generation_config.num_denoising_steps = None


# ---- infilling ----


def test_blanks_are_filled_and_the_text_around_them_stays(fill, tokenizer):
    fill.model.generate(max_new_tokens=1)
    record = fill("The [BLANK:8] sat on the[BLANK:2]. The dog")
    assert record["text"].startswith("The ") and " sat on the" in record["text"]
    assert record["text"].endswith(". The dog") and len(record["fills"]) == 2
    between = record["text"].removeprefix("The ").removesuffix(". The dog")
    assert between == record["fills"][0].removeprefix(" ") + " sat on the" + record["fills"][1]


@pytest.mark.parametrize("seed", range(8))
def test_fixed_text_never_changes_and_lengths_are_as_asked(fill, seed):
    generator = torch.Generator().manual_seed(seed)
    words = ["The", " cat ", "  sat", " on\n", "é", "the ", "mat."]
    order = torch.randperm(len(words), generator=generator).tolist()
    fixed, lengths = [words[i] for i in order[:4]], torch.randint(1, 5, (3,), generator=generator).tolist()
    text = fixed[0] + "".join(f"[BLANK:{n}]{after}" for n, after in zip(lengths, fixed[1:], strict=True))
    inputs = fill.preprocess(text)
    assert inputs["infill_mask"].sum() == sum(lengths) and inputs["lengths"] == lengths
    output = fill._forward(dict(inputs), generator=generator, num_return_sequences=2)
    assert [len(row) for row in output["filled"]] == [sum(lengths)] * 2
    for record in fill.postprocess(output):
        rest = record["text"]
        for piece, filled in zip(fixed, [*record["fills"], ""], strict=True):
            assert rest.startswith(piece)
            rest = rest[len(piece) :]
            rest = rest.removeprefix(filled.removeprefix(" ") if piece.endswith(" ") else filled)
        assert rest == ""


def test_spans_are_replaced_by_as_many_tokens_or_as_asked(fill, tokenizer):
    text = "The cat sat on the mat"
    record = fill({"text": text, "spans": [[4, 7], [19, 22]], "lengths": [3, 1]})
    assert record["text"].startswith("The ") and " sat on the " in record["text"]
    inputs = fill.preprocess({"text": text, "spans": [[4, 7]]})
    assert inputs["lengths"] == [len(tokenizer("cat")["input_ids"])]


def test_several_texts_and_generation_arguments(fill):
    records = fill(["A [BLANK:2] cat", "[BLANK:3]"], do_sample=False, num_denoising_steps=3)
    assert len(records) == 2 and records[1]["text"] == records[1]["fills"][0]
    again = fill(["A [BLANK:2] cat", "[BLANK:3]"], do_sample=False, num_denoising_steps=3)
    assert [set(record) for record in again] == [{"text", "fills"}] * 2
    assert len(fill("A [BLANK:2] cat", num_return_sequences=3)) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_texts_is_filled_as_each_alone(fill, tokenizer, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    texts, greedy = ["The cat [BLANK:2] on", "[BLANK:3] dog", "The dog sat [BLANK:1]"], {"do_sample": False}
    alone = [fill(text, num_denoising_steps=3, **greedy) for text in texts]
    assert fill(texts, num_denoising_steps=3, batch_size=3, **greedy) == alone
    several = fill(texts, batch_size=2, num_return_sequences=2)
    assert [len(records) for records in several] == [2, 2, 2]
    assert all(record["text"].startswith("The cat ") for record in several[0])


def test_a_saved_number_of_new_tokens_is_not_for_infilling(fill, monkeypatch):
    monkeypatch.setattr(fill.model.generation_config, "max_new_tokens", 5)
    assert fill("The [BLANK:2] sat")["text"].endswith(" sat")


def test_a_model_over_digits_fills_in_too(tokenizer):
    fill = TDLMInfillingPipeline(model=prime_model(len(tokenizer)), tokenizer=tokenizer)
    assert fill("The [BLANK:3] sat")["text"].startswith("The ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no gap", "no blank in 'no gap'"),
        ("a [BLANK:0] gap", "a blank has 0 tokens"),
        ("a [BLANK:99] gap", "do not fit in the context of 32"),
        ({"text": "abc", "spans": [[2, 1]]}, r"spans=\[\[2, 1\]\] must be \(start, end\) offsets into the 3 char"),
        ({"text": "abc", "spans": [[0, 4]]}, "must be"),
        ({"text": "abc", "spans": [[0]]}, "must be"),
        ({"text": "abc", "spans": [[0, 1]], "lengths": [1, 2]}, "2 lengths for 1 spans"),
        ({"text": "a [BLANK:2]"}, r"has text, spans and maybe lengths, not \['text'\]"),
    ],
)
def test_blanks_that_make_no_sense_are_named(fill, text, message):
    with pytest.raises(ValueError, match=message):
        fill(text)


def test_infilling_appends_nothing(fill):
    with pytest.raises(ValueError, match=r"max_new_tokens=3: infilling appends nothing"):
        fill("The [BLANK:2] sat", max_new_tokens=3)


# ---- saved and found again ----


def test_a_checkpoint_names_its_infilling_pipeline(folder, generator, tmp_path):
    entry = {"impl": "pipeline_tdlm.TDLMInfillingPipeline", "pt": ["AutoModelForCausalLM"]}
    assert json.loads((folder / "config.json").read_text())["custom_pipelines"] == {"infilling": entry}
    generator.save_pretrained(tmp_path / "generation")
    TDLMInfillingPipeline(generator.model, generator.tokenizer).save_pretrained(tmp_path / "infilling")
    for name in ("generation", "infilling"):
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["custom_pipelines"] == {"infilling": entry} and (tmp_path / name / "pipeline_tdlm.py").exists()
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() == generator.tokenizer.get_vocab()


def test_both_pipelines_load_where_tdlm_is_not_installed(folder):
    printed = in_a_stranger(
        "from transformers import pipeline\n"
        "generate = pipeline('text-generation', model=sys.argv[1], trust_remote_code=True)\n"
        "fill = pipeline('infilling', model=sys.argv[1], trust_remote_code=True)\n"
        "print(generate('The cat', max_new_tokens=3)[0]['generated_text'].startswith('The cat'))\n"
        "print(fill('The [BLANK:3] sat')['text'].startswith('The '))\n",
        str(folder),
    )
    assert printed.split() == ["True", "True"]


def test_without_trust_no_pipeline_code_is_run(folder):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("infilling", model=str(folder))


# ---- streaming ----


def test_a_draft_goes_from_root_to_cluster_to_word(model, tokenizer, capsys):
    prompt = tokenizer("The cat", return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    ids = model.generate(
        **prompt, max_new_tokens=6, streamer=TreeTextStreamer(tokenizer, model.tree), generator=generator
    )
    shown = capsys.readouterr().out
    drafts = [part.split("\033[0m")[0] for part in shown.split("\033[33m")[1:]]
    assert len(drafts) == 6 and "_" in drafts[0] and "<" in drafts[1] and " _" not in drafts[-1]
    final = shown.split("\033[J")
    text = final[0].split("\0337")[0] + final[-1]
    assert text.rstrip("\n") == tokenizer.decode(ids[0])


def test_a_streamer_serves_again(model, tokenizer, capsys):
    streamer, shown = TreeTextStreamer(tokenizer, model.tree), []
    for _ in range(2):
        model.generate(max_new_tokens=3, streamer=streamer, generator=torch.Generator().manual_seed(0))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and " <" in shown[0]


@pytest.mark.parametrize("streamer", [TextStreamer, TextDiffusionStreamer])
def test_transformers_own_streamers_work(model, tokenizer, streamer, capsys):
    prompt = tokenizer("The cat", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=6, streamer=streamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n").endswith(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])[-3:])
    ids = model.generate(max_new_tokens=3, streamer=streamer(tokenizer, skip_prompt=True))  # nothing to skip
    assert tokenizer.decode(ids[0])[-1:] in capsys.readouterr().out


def test_a_terminal_shows_one_sequence(model, tokenizer):
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(max_new_tokens=3, num_return_sequences=2, streamer=TreeTextStreamer(tokenizer, model.tree))
