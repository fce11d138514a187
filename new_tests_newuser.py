# ruff: noqa: F811  the fixtures are imported until this is part of test_shimmy.py
"""What a new user met: names, the port, the network, memory, and the shell's command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from test_shimmy import (  # noqa: F401
    HANG,
    SHIMMY,
    Server,
    assert_failed,
    cases,
    environment,
    models,
    module,
    server,
    shimmy,
    tool_root,
    write_recital,
)

# topic: names


@cases("command", {"generate": ["generate", "--prompt", "x"], "probe": ["probe"]})
def test_model_misspelt_on_the_command_line_is_told_with_the_near_name(command: list[str], tmp_path: Path) -> None:
    write_recital(tmp_path / "models" / "recital.gguf")
    done = shimmy(command[0], "recitol", *command[1:], home=tmp_path, env={"SHIMMY_MODEL_PATHS": str(tmp_path / "models")})
    assert_failed(done, 1, "did you mean recital?")
    assert b"--alias" not in done.stderr


def test_model_misspelt_in_a_request_is_told_with_the_near_name(server: Server) -> None:
    assert "(did you mean recital? available: " in server.chat(model="recitol").json()["error"]["message"]


# topic: serve


def test_serve_on_a_taken_port_says_how_to_take_another(server: Server, tmp_path: Path) -> None:
    done = shimmy("serve", "--port", str(server.port), home=tmp_path)
    assert_failed(done, 1, "Address already in use; --port N listens on another")


@cases(
    "free,options,tokens",
    {"four contexts": (1 << 30, {}, 400), "of a smaller one": (1 << 30, {"ctx": 50}, 200),
     "as told": (1 << 30, {"kv_pool": 300}, 300), "a quarter of what is left": (13_000, {}, 150),
     "one at least": (2_000, {}, 100)},
)  # fmt: skip
def test_memory_that_serve_announces_counts_the_kv_pool(free: int, options: dict[str, Any], tokens: int) -> None:
    model = module.ModelInfo("m", "m", "/m.gguf", "", 1000, "llama", None, None, 100, False, None, None, "", kv_numbers=10)
    assert module.pool_bytes(model, module.EngineOptions(**options), free) == tokens * 10 * 2


# topic: pull


def test_pull_without_a_network_asks_about_the_network(tmp_path: Path) -> None:
    env = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    done = shimmy("pull", "someone/something", home=tmp_path, env=env)
    assert_failed(done, 1, "is the network there? HF_ENDPOINT names another hub")


# topic: completion


@cases("other,used", {"no other": (False, "shimmy 0"), "another program": (True, "the other one")})
def test_completion_makes_shimmy_a_command_unless_there_is_one(other: bool, used: str, tmp_path: Path) -> None:
    script = shimmy("completion", "bash", home=tmp_path).stdout.decode()
    (tmp_path / "bin").mkdir()
    if other:
        (tmp_path / "bin" / "shimmy").write_text("#!/bin/sh\necho the other one\n")
        (tmp_path / "bin" / "shimmy").chmod(0o755)
    env = environment(tmp_path, {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    done = subprocess.run(["bash", "-c", f"{script}\nshimmy --version"], cwd="/", env=env, capture_output=True, timeout=HANG,
                          check=True)  # fmt: skip
    assert done.stdout.decode().startswith(used)


def test_shimmy_is_executable() -> None:
    assert os.access(SHIMMY, os.X_OK)
