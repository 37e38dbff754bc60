"""`make sdks`: clients of others, each in an environment of its own, against a whole system.

    python -m tests.sdks [CLIENT ...]

The models are stubs: it is about protocols. A client is installed from its package index the first
time, into .cache/sdks. Prints a line for each and ends with status 1 if one failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.sdks.client import Client
from tests.sdks.system import running_system

TIMEOUT_S = 300

CLIENTS = (
    Client("openai-3", ("openai==3.57.0",), "openai_python.py"),
    Client("openai-2", ("openai==2.54.0",), "openai_python.py"),
    Client("openai-1", ("openai==1.109.1",), "openai_python.py"),
    Client("anthropic-2", ("anthropic==2.14.0",), "anthropic_python.py"),
    Client("anthropic-0", ("anthropic==0.125.0",), "anthropic_python.py"),
    Client("openai-node", ("openai@7.57.0",), "openai_node.mjs"),
    Client("anthropic-node", ("@anthropic-ai/sdk@1.14.0",), "anthropic_node.mjs"),
    Client("ai-sdk", ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92"), "ai_sdk.mjs"),
    Client("autobatcher", ("autobatcher==0.12.0",), "autobatcher_chat.py"),
    Client("inspect", ("inspect-ai==0.3.285", "openai==2.54.0"), "inspect_batch.py"),
    Client("curator", ("bespokelabs-curator==0.1.31",), "curator_batch.py"),
)


def main(only: list[str]) -> int:
    num_failed = 0
    with running_system() as url:
        environ = os.environ | {
            "GRISTMILL_URL": url,
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": "none",
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "none",
        }
        for client in CLIENTS:
            if only and client.name not in only:
                continue
            why, took_s = _tried(client, environ)
            num_failed += bool(why)
            print(f"{client.name:16} {'failed' if why else 'passed'} {took_s:6.1f} s", flush=True)
            if why:
                print(why, flush=True)
    return int(num_failed > 0)


def _tried(client: Client, environ: dict[str, str]) -> tuple[str, float]:
    """What is wrong, if anything is, and how long it took once it was installed."""
    try:
        command = client.command()
        began = time.monotonic()
        done = subprocess.run(
            command,
            cwd=client.folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.CalledProcessError as error:
        return f"not installed: {error.stderr.decode()[-2_000:]}", 0.0
    except subprocess.TimeoutExpired:
        return f"not over after {TIMEOUT_S} s", float(TIMEOUT_S)
    why = (done.stdout + done.stderr)[-4_000:] if done.returncode else ""
    return why, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
