"""sparse24 analyze: a checkpoint on disk, a text, and the files that it writes."""

import csv
import json
import re

import pytest
import torch
from recipes import GUIDE

import sparse24
from sparse24 import cli, prune24
from sparse24.analyze import command

transformers = pytest.importorskip("transformers")


def save(folder, **options):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ArceeConfig(
        **sizes, num_key_value_heads=4, vocab_size=300, max_position_embeddings=64, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{number} is a number, and so is {number * number}.\n" for number in range(200)))
    return path


def analyze(*arguments):
    return cli.main(["analyze", *map(str, arguments), "--device", "cpu"])


def test_it_writes_what_it_found(folder, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / "new" / f"out.{kind}" for kind in ("json", "csv", "svg")}
    options = ["--json", files["json"], "--csv", files["csv"], "--plot", files["svg"], "--max-tokens", 1000]
    assert analyze(folder, "--text", text, *options, "--prefill", 512) == 0
    printed = capsys.readouterr().out
    content = json.loads(files["json"].read_text())
    assert printed.splitlines()[-1] == content["verdict"] and "on 1,000 tokens, in float32" in printed
    assert list(content["layers"]) == [f"model.layers.{i}.mlp" for i in range(2)]
    assert all(layer["tokens"] == 1000 for layer in content["layers"].values())
    assert content["tokens_per_call"]["prefill"] == 512
    with files["csv"].open() as stream:
        assert [row["layer"] for row in csv.DictReader(stream)] == list(content["layers"])
    assert files["svg"].read_text().startswith("<?xml")


def test_a_tokenizer_of_the_folder_is_used(tmp_path, text, capsys):
    """Two words are known, and all others are one token."""
    tokenizers = pytest.importorskip("tokenizers")
    save(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "is": 1, "number": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    out = tmp_path / "out.json"
    assert analyze(tmp_path, "--text", text, "--json", out) == 0
    assert "no tokenizer" not in capsys.readouterr().out
    count = len(words.encode(text.read_text()).ids)
    found = {layer["tokens"] for layer in json.loads(out.read_text())["layers"].values()}
    assert found == {count // 64 * 64}  # whole windows


@pytest.mark.parametrize("choice", ["up", "both"])
def test_the_loss_with_two_four_weights(folder, text, tmp_path, capsys, choice):
    """By converting and evaluating the checkpoint; what it is afterwards, `analyze_weights` sees to."""
    options = ["--sparse-weights", choice, "--ranks", 0, 64, "--max-tokens", 600, "--json", tmp_path / "out.json"]
    assert analyze(folder, "--text", text, *options) == 0
    losses = json.loads((tmp_path / "out.json").read_text())["weights_loss"]
    assert list(losses) == ["dense", "pruned", "rank 64"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    batches = command.batches_of(model, lambda read: [byte % 300 for byte in read.encode()], [text], 600, learn=True)
    batch = next(iter(batches))
    assert batch["labels"] is batch["input_ids"]

    def loss():
        with torch.no_grad():
            return model(**batch).loss.item()

    assert losses["dense"] == pytest.approx(loss())
    for block in model.model.layers:
        block.mlp.up_proj.weight.data = prune24(block.mlp.up_proj.weight.data)
        if choice == "both":
            block.mlp.down_proj.weight.data = prune24(block.mlp.down_proj.weight.data, 0)
    assert losses["pruned"] == pytest.approx(loss()) and losses["pruned"] != losses["dense"]
    if choice == "up":  # adapters of full rank give all of it back
        assert losses["rank 64"] == pytest.approx(losses["dense"], rel=1e-5)
    printed = capsys.readouterr().out
    change = 100 * (losses["pruned"] / losses["dense"] - 1)
    assert f"  pruned    {losses['pruned']:9.4f}{change:+9.2f} %" in printed.splitlines()


def test_weights_chosen_on_another_text(folder, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("to calibrate, read this. " * 40)
    options = ["--sparse-weights", "up", "--ranks", 0, 8, "--max-tokens", 600, "--json", tmp_path / "out.json"]
    assert analyze(folder, "--text", text, *options, "--calibrate", other) == 0
    losses = json.loads((tmp_path / "out.json").read_text())["weights_loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    evaluated, calibrated = (
        list(command.batches_of(model, lambda read: [byte % 300 for byte in read.encode()], [file], 600, learn=True))
        for file in (text, other)
    )
    wanted = sparse24.analyze_weights(model, evaluated[:1], ranks=(0, 8), calibration=calibrated[:1])
    assert losses == pytest.approx(wanted)
    assert "pruned by magnitude and calibration, nothing trained" in capsys.readouterr().out
    by_magnitude = sparse24.analyze_weights(model, evaluated[:1], ranks=(0, 8))
    assert losses["pruned"] != by_magnitude["pruned"] and losses["dense"] == by_magnitude["dense"]


def test_without_a_tokenizer_bytes_are_tokens_and_it_says_so(folder, tmp_path, capsys):
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("0123456789")
    empty.touch()
    assert analyze(folder, "--text", empty, short) == 0
    printed = capsys.readouterr().out
    assert "has no tokenizer: each byte of the text is taken for a token" in printed and "on 10 tokens" in printed
    assert analyze(folder, "--text", empty) == 2
    assert "expected --text to have at least one token, got none" in capsys.readouterr().err


def test_it_reads_no_more_than_it_needs(folder, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("a" * 100_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    read = []
    batches = command.batches_of(model, lambda text: read.append(len(text)) or [1] * len(text), [long, long], 100)
    first = next(batches)
    assert read == [1600] and first["input_ids"].shape == (25, 64) and first["use_cache"] is False
    assert first["logits_to_keep"] == 1


def test_the_commands_of_the_guide_run(folder, text, tmp_path, monkeypatch, capsys):
    """Every command of docs/guide/analyze.md, in a folder with the files that it names."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name in ("words.txt", "more.txt"):
        (tmp_path / name).write_text(text.read_text()[:3000])
    (tmp_path / "MODEL_DIR").symlink_to(folder)
    commands = re.findall(r"^    sparse24 (analyze .+)$", (GUIDE / "analyze.md").read_text(), re.MULTILINE)
    assert len(commands) >= 3
    for line in commands:
        assert cli.main(line.split()) == 0, line
        assert capsys.readouterr().out.splitlines()[-1].startswith("convert ")
    assert all((tmp_path / f"out.{kind}").stat().st_size > 500 for kind in ("json", "csv", "svg"))


def test_what_cannot_run_is_said_in_a_sentence(folder, text, tmp_path, capsys):
    def said(*arguments):
        assert analyze(*arguments) == 2
        error = capsys.readouterr().err.splitlines()
        assert len([line for line in error if line.startswith("error: ")]) == 1
        return error[-1]

    assert "expected MODEL_DIR to be a folder with a config.json" in said(tmp_path, "--text", text)
    assert "No such file" in said(folder, "--text", tmp_path / "none.txt")
    short = tmp_path / "short.txt"
    short.write_text("a")
    words = "expected --text to have at least two tokens for --sparse-weights, got one"
    assert words in said(folder, "--text", short, "--sparse-weights", "up")
    for content, got in (("a", "one"), ("", "none")):
        short.write_text(content)
        words = f"expected --calibrate to have at least two tokens for --sparse-weights, got {got}"
        assert words in said(folder, "--text", text, "--sparse-weights", "up", "--calibrate", short)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "expected MODEL_DIR to be loaded by transformers" in said(tmp_path, "--text", text)
    for arguments in ((folder,), (folder, "--text", text, "--plot", tmp_path / "out.txt")):
        with pytest.raises(SystemExit) as exit:
            analyze(*arguments)
        assert exit.value.code == 2
    assert "expected a file that ends in .svg, .png, .pdf" in capsys.readouterr().err


def test_arguments_are_looked_at_before_the_model(tmp_path, text, monkeypatch, capsys):
    """It may take long to load."""
    monkeypatch.setattr(command, "load", lambda _: pytest.fail("too early"))
    for arguments, said in (
        (("--text", tmp_path / "none.txt"), "No such file"),
        (("--text", text, tmp_path), "Is a directory"),
        (("--text", text, "--max-tokens", 0), "expected --max-tokens to be at least 1, got 0"),
        (("--text", text, "--decode", -1), "expected decode to be at least 0, got -1"),
        (("--text", text, "--calibrate", text), "expected --sparse-weights, which --calibrate is for, got none"),
        (("--text", text, "--calibrate", tmp_path / "none.txt", "--sparse-weights", "up"), "No such file"),
        (("--text", text, "--ranks", 4), "expected --sparse-weights, which --ranks are of, got none"),
        (("--text", text, "--sparse-weights", "up", "--ranks", -1), "expected --ranks to be at least 0, got -1"),
    ):
        assert analyze(tmp_path, *arguments) == 2
        assert said in capsys.readouterr().err


def test_a_model_that_fails_is_said_in_a_sentence(tmp_path, text, capsys):
    """Here of tokens that it does not know. Status 1 would say that something was wrong with the results."""
    tokenizers = pytest.importorskip("tokenizers")
    save(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 999}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    assert analyze(tmp_path, "--text", text) == 2
    assert "expected the model to run on the text, got IndexError" in capsys.readouterr().err


def test_a_model_without_networks_has_no_table(tmp_path, text, capsys):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert analyze(tmp_path, "--text", text) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed and "zeros" not in printed and "0 tokens" not in printed
    assert printed.splitlines()[-1].startswith("convert 0 of 2; 2 cannot be converted (gated")
