"""The commands of the guide and of the compose file, through the very parser of the installed vLLM."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from retrv_r1_retriever.engines.vllm import TEMPLATE
from tests.serving.test_compose import COMPOSE
from tests.vllm.server import FLAGS, ROOT

pytestmark = pytest.mark.vllm

PARSE = """
import json, sys
import vllm
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
for command in json.load(sys.stdin):
    parser = FlexibleArgumentParser(exit_on_error=False)
    args = make_arg_parser(parser).parse_args(command)
    validate_parsed_serve_args(args)
    print(args.enable_prompt_embeds, args.limit_mm_per_prompt["image"])
"""


def commands() -> list[list[str]]:
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    found = [
        shlex.split(line, comments=True)[2:]
        for block in re.findall(r"^```bash\n(.*?)^```", guide, re.S | re.M)
        for line in block.replace("\\\n", "").splitlines()
        if line.startswith("vllm serve")
    ]
    return [*found, COMPOSE["services"]["vllm"]["command"], list(FLAGS)]


def test_vllm_knows_every_flag(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "parts.jinja").write_text(TEMPLATE)
    asked = commands()
    assert len(asked) >= 5
    done = subprocess.run(
        [str(installed), "-c", PARSE],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-len(asked) - 1 : -1] == ["True 8"] * len(asked)
