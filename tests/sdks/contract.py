"""`make contract`: schemathesis reads our OpenAPI description and tries what it allows, and more.

    python -m tests.sdks.contract [CASES]

At least CASES (20,000) calls are made, bent in every way that schemathesis knows, against a whole
system with stub models. Wrong is an answer of 5xx but for 503 and 504, which say that something is
away, and one that the description does not have. Ends with status 1 then.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx

from tests.sdks.client import Client
from tests.sdks.system import running_system

TOOL = Client("schemathesis", ("schemathesis==4.32.5",), "-")
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance"
)
ALLOWED = {503, 504}


def main(cases: int) -> int:
    environ = dict(os.environ)
    python = Path(TOOL.command()[0])
    with running_system() as url:
        paths = httpx.get(f"{url}/openapi.json").json()["paths"]
        num_operations = sum(len(operations) for operations in paths.values())
        made, round_number = 0, 0
        wrong: list[str] = []
        while made < cases and not wrong:
            report = TOOL.folder / f"report-{round_number}.ndjson"
            command = [
                *(str(python.with_name("st")), "run", f"{url}/openapi.json"),
                *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing"),
                *("--max-examples", str(max(50, 2 * cases // (3 * num_operations)))),
                *("--seed", str(round_number), "--request-timeout", "30", "--continue-on-failure"),
                *("--report", "ndjson", "--report-ndjson-path", str(report)),
            ]
            done = subprocess.run(
                command,
                cwd=TOOL.folder,  # where it keeps what it found
                env=environ,
                capture_output=True,
                text=True,
                check=False,
            )
            told = done.stdout + done.stderr
            number = re.search(r"([\d,]+) generated", told)
            made += int(number[1].replace(",", "")) if number else 0
            print(told[-6_000:], flush=True)
            if done.returncode or not number:
                wrong.append(told)
            round_number += 1
    print(json.dumps({"bench": "contract", "cases": made, "wrong": len(wrong)}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))
