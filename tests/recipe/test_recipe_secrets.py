"""A secret in a recipe is a fault, and no message repeats it."""

from __future__ import annotations

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe import parse_recipe
from peftcli.redact import is_secret, is_secret_key, redact

# Put together here, so that no scanner takes this file for a leak.
BODY = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ"
SECRETS = [
    "hf_" + BODY,
    "sk-" + BODY,
    "sk-proj-" + BODY,
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + BODY,
    "github_pat_" + BODY,
    "xoxb-" + "1234567890-abcdefghij",
    "Bearer " + BODY,
    "eyJhbGciOiJIUzI1" + ".eyJzdWIiOiIxMjM0NTY3" + ".abcdefgh",
    BODY + "xY2zA4",
    "https://user:" + "hunter2hunter@host/data.jsonl",
    "password=" + "hunter2hunter",
]
SHORT = "base_model: m\nmethod: lora\ndataset: rows.jsonl\n"


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "text",
    [
        "{0}output_dir: '{1}'",
        "{0}train: {{'{1}': 1}}",
        "{0}train: {{seed: '{1}'}}",
        "{0}train: {{report_to: ['{1}']}}",
        "{0}'{1}': 3",
        "{0}train: {{a: {{b: ['{1}']}}}}",
        "base_model: '{1}'\nmethod: {{name: '{1}'}}\ndataset: ['{1}']",
    ],
)
def test_secrets_are_faults_and_never_shown(secret: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text.format(SHORT, secret))
    core = secret.removeprefix("Bearer ").removeprefix("password=").partition("user:")[2].partition("@")[0] or secret[-14:]
    assert core not in str(caught.value)
    assert core not in repr(caught.value.faults)
    assert any("secret" in fault.message for fault in caught.value.faults)


@pytest.mark.parametrize(
    "override", ["output_dir={}", "{}=1", "train.{}=1", "train.seed={}", "{}", "train.x.y={}", "output_dir=*{}", "a=[{}"]
)
def test_nor_are_those_of_an_override(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(SHORT, overrides=[override.format(SECRETS[0])])
    assert BODY not in str(caught.value)


@pytest.mark.parametrize("key", ["token", "hub_token", "password", "api_key", "wandb_api_key", "secret", "HF_TOKEN", "api-key"])
@pytest.mark.parametrize("value", ["hunter2", "{a: hunter2}", "[hunter2]"])
def test_values_of_secret_keys_are_hidden_whatever_their_shape(key: str, value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"{SHORT}train: {{{key}: {value}}}", "r.yaml")
    (fault,) = caught.value.faults
    assert "hunter2" not in str(caught.value)
    assert (fault.line, fault.found) == (4, "<hidden>")
    assert "environment" in str(fault.allowed)


@pytest.mark.parametrize(
    "text",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "0123456789abcdef0123456789abcdef01234567",
        "runs/SmolLM2-135M-Instruct-lora-rank16-alpha32-lr2e-4-Seed42",
        "SmolLM2_135M_Instruct_lora_rank16_alpha32_lr2e4_Seed42_Second",
        r".*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)",
        "You are a helpful assistant. Your task: answer the token question basic as it is.",
        "https://example.org/a/b@c",
        "data/sk-learn-contrib-long-name/rows.jsonl",
        "A basic understanding-of-internationalization suffices; the bearer representative answers token: positive.",
        "<|im_start|>",
    ],
)
def test_ordinary_values_are_no_secrets(text: str) -> None:
    assert not is_secret(text)
    assert redact(text) == text
    assert parse_recipe(SHORT, overrides=[f"output_dir='{text}'"]).recipe.output_dir == text


@pytest.mark.parametrize("key", ["new_tokens", "batch_tokens", "max_new_tokens", "tokenizer", "secretary", "key", "keys"])
def test_ordinary_keys_are_no_secret_keys(key: str) -> None:
    assert not is_secret_key(key)
