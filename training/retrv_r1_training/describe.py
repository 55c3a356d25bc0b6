"""What the frozen language model says of a candidate that it reads in full: the target of `align` where there are no captions.

Said once per candidate and kept in an SQLite file, as token ids: sampled tokens go back as they were.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from retrv_r1_retriever import _sync
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.prompt import Prompt
from retrv_r1_retriever.session import GenerateParams
from retrv_r1_retriever.trace import Full, Sampled
from retrv_r1_retriever.types import Content, Query
from retrv_r1_training.align import Frame
from retrv_r1_training.data import Item


class Descriptions:
    """`of(items)` -> what the model says of each, greedily, up to `tokens` tokens or its end of turn; the caption where there is one.

    file: made when it is needed; several processes may share it
    """

    def __init__(self, checkpoint: Checkpoint, frame: Frame, tokens: int, file: Path) -> None:
        self._checkpoint = checkpoint
        self._frame, self._tokens, self._file = frame, tokens, file
        self._facts = json.dumps([checkpoint.manifest.checkpoint_digest, frame.before, frame.after, frame.cue, tokens])

    def of(self, items: Sequence[Item]) -> list[Sampled]:
        said = [Sampled(self._frame.lead + item.caption) if item.caption else None for item in items]
        unknown = {item.id: item for item, words in zip(items, said, strict=True) if words is None}
        known = self._known(unknown)
        new = [item for did, item in unknown.items() if did not in known]
        if not new:
            return [words or known[item.id] for item, words in zip(items, said, strict=True)]
        known |= dict(zip((item.id for item in new), _sync.run(self._say([i.content for i in new])), strict=True))
        self._keep({item.id: known[item.id] for item in new})
        return [words or known[item.id] for item, words in zip(items, said, strict=True)]

    @cached_property
    def _engine(self) -> LocalEngine:
        return LocalEngine(self._checkpoint)

    async def _say(self, contents: Sequence[Content]) -> list[Sampled]:
        return list(await asyncio.gather(*map(self._say_one, contents)))

    async def _say_one(self, content: Content) -> Sampled:
        prompt = Prompt(Query(content), (), tuple(self._frame.around((Full(0, content, cue=False),))))
        handle = await self._engine.open(prompt)
        try:
            said = await self._engine.generate(handle, GenerateParams((), self._tokens))
        finally:
            await self._engine.close(handle)
        return Sampled(said.text, said.token_ids)

    def _key(self, did: str) -> str:
        return blake2b(f"{self._facts} {did}".encode(), digest_size=16).hexdigest()

    def _known(self, wanted: Iterable[str]) -> dict[str, Sampled]:
        with closing(self._open()) as table:
            rows = {
                did: table.execute("SELECT ids, text FROM said WHERE key = ?", (self._key(did),)).fetchone()
                for did in wanted
            }
        return {did: Sampled(row[1], tuple(json.loads(row[0]))) for did, row in rows.items() if row}

    def _keep(self, said: dict[str, Sampled]) -> None:
        rows = [(self._key(did), json.dumps(s.token_ids), s.text) for did, s in said.items()]
        with closing(self._open()) as table, table:
            table.executemany("INSERT OR IGNORE INTO said VALUES (?, ?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        table = sqlite3.connect(self._file, timeout=60)
        table.execute("CREATE TABLE IF NOT EXISTS said(key TEXT PRIMARY KEY, ids TEXT, text TEXT)")
        return table
