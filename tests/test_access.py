"""Access: which role may use which route, tokens by their hashes, and limits of requests."""

import hashlib
import stat
from pathlib import Path

import pytest

from foretaste.errors import ConfigError
from foretaste.serving.settings import (
    Access,
    ServerSettings,
    Token,
    TokenConfig,
    access_of,
    add_token,
    is_loopback,
    needed_role,
    read_tokens,
)


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/v1/model", "read"),
        ("HEAD", "/metrics", "read"),
        ("POST", "/v1/recommend", "read"),
        ("POST", "/v1/events", "write"),
        ("DELETE", "/v1/events", "write"),
        ("DELETE", "/v1/users/a/b/events", "write"),
        ("POST", "/v1/model/reload", "admin"),
        ("POST", "/v1/users/a/events", "admin"),
        ("PUT", "/v1/recommend2", "admin"),
        ("POST", "/", "admin"),
    ],
)
def test_a_request_needs_the_role_of_what_it_does(method: str, path: str, role: str) -> None:
    assert needed_role(method, path) == role


def test_an_admin_may_do_everything_and_each_other_role_itself_alone() -> None:
    def may(*roles: str) -> list[bool]:
        token = Token(TokenConfig(name="t", sha256="0" * 64, roles=roles), lambda: 0.0)
        return [token.may(role) for role in ("read", "write", "admin")]

    assert may("read") == [True, False, False]
    assert may("write") == [False, True, False]
    assert may("read", "write") == [True, True, False]
    assert may("admin") == [True, True, True]


def test_a_token_has_a_minute_s_requests_at_once_and_gets_them_back_evenly() -> None:
    now = 0.0
    token = Token(
        TokenConfig(name="t", sha256="0" * 64, requests_per_minute=3), lambda: now
    )  # one every 20 s
    assert [token.wait_s() for _ in range(4)] == [0, 0, 0, 20]
    now = 19.0
    assert token.wait_s() == pytest.approx(1)
    now = 20.0
    assert [token.wait_s(), token.wait_s()] == pytest.approx([0, 20])
    now = 10_000.0  # no more than a minute's are saved up
    assert [token.wait_s() for _ in range(4)] == [0, 0, 0, 20]
    free = Token(TokenConfig(name="t", sha256="0" * 64), lambda: now)
    assert {free.wait_s() for _ in range(1000)} == {0}


def test_a_token_that_was_made_is_found_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    made = add_token(path, "shop", roles=("read", "write"), requests_per_minute=60)
    path.write_text(path.read_text() + "# a note of a person's\n")
    other = add_token(path, "cron", roles=("admin",))
    text = path.read_text()
    assert "# a note" in text
    assert made not in text
    assert other not in text
    assert hashlib.sha256(made.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["tokens.toml"]
    access = Access(read_tokens(path).tokens)
    assert [access.find(t.encode()).name for t in (made, other)] == ["shop", "cron"]
    assert access.find(made.encode() + b" ") is None
    assert access.find(b"") is None
    assert len(made) >= 43  # 256 bits


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"name": "shop"}, "has a token named shop"),
        ({"name": 'a"b'}, "name"),
        ({"name": "x", "roles": ("root",)}, "roles"),
        ({"name": "x", "roles": ()}, "roles"),
    ],
)
def test_a_token_that_cannot_be_is_not_added(tmp_path: Path, call: dict, says: str) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path, "shop")
    before = path.read_text()
    with pytest.raises(ConfigError, match=says):
        add_token(path, **call)
    assert path.read_text() == before
    with pytest.raises(ConfigError, match="cannot be written"):
        add_token(tmp_path / "nowhere" / "t.toml", "shop")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read as a file of tokens"),
        ("tokens = ", "cannot be read as a file of tokens"),
        ("", "has no token"),
        ("[[tokens]]\nname = 'a'\ntoken = 'secret'", "token"),
        ("[[tokens]]\nname = 'a'\nsha256 = 'secret'", "sha256"),
        (f"[[tokens]]\nname = 'a'\nsha256 = '{'0' * 64}'\n" * 2, "two tokens have the same name"),
    ],
)
def test_a_file_of_tokens_that_is_wrong_is_refused_before_anything_is_served(
    tmp_path: Path, text: str | None, says: str
) -> None:
    path = tmp_path / "tokens.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        access_of(ServerSettings(token_file=path))


def test_a_server_that_others_can_reach_needs_a_token_by_default() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "shop.example", ""):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="open to other machines") as caught:
            access_of(ServerSettings(host=host))
        assert caught.value.name == "token"
        assert not access_of(ServerSettings(host=host, token="t")).is_open
        assert access_of(ServerSettings(host=host, allow_anyone=True)).is_open
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert access_of(ServerSettings(host=host)).is_open


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_an_empty_token_is_a_secret_that_was_not_set(token: str) -> None:
    with pytest.raises(ConfigError, match="is empty") as caught:
        ServerSettings(token=token)
    assert caught.value.name == "token"
