"""Blocks on file: what is heard of them, and what is made of it."""

from functools import partial

from jaxllm.simulation.bug import CORE, HOST, LOOP, TABLES, Bug

DISK, RECORDER = f"{CORE}.disk_tier", "jaxllm.journal.core"

_bug = partial(Bug, scenario="files")

BUGS_OF_FILES = (
    _bug(
        "a file's name is another block's",
        TABLES,
        "self._moves.writes.append((len(self._moves.saves), block_hash))",
        "self._moves.writes.append((max(0, len(self._moves.saves) - 1), block_hash))",
    ),
    _bug(
        "a block counts when it has been asked for",
        DISK,
        "self._asked.append((block_hash, slot))",
        "self._asked.append((block_hash, slot)), self._host._slots.update({block_hash: slot})",
    ),
    _bug(
        "a block that is lost counts as read",
        DISK,
        "            self._host.release(slot)\n",
        "            self._host.arrive(block_hash, slot)\n",
    ),
    _bug(
        "the slot of a lost block is lost, too",
        DISK,
        "        if slot is not None:\n            self._host.release(slot)\n",
        "",
        answers=False,
    ),
    _bug(
        "a slot that is read into is given to another",
        HOST,
        "        return self._free.popleft()\n",
        "        self._free.append(self._free.popleft())\n        return self._free[-1]\n",
    ),
    _bug(
        "reads outlive a reset",
        TABLES,
        "        self.disk.forget_reads()\n",
        "",
        answers=False,
    ),
    _bug(
        "who waits for a file is forgotten when it is lost",
        DISK,
        "            self._give_up(block_hash)\n        self",
        "            pass\n        self",
    ),
    _bug(
        "a slot is given up while its block is on its way",
        DISK,
        "for block_hash in news.failed:",
        "for block_hash in (*news.failed, *news.gone):",
    ),
    _bug(
        "a block is asked for twice",
        DISK,
        "        if block_hash in self._reading:\n            return True\n        if",
        "        if",
    ),
    _bug(
        "what is asked for is not read",
        LOOP,
        "self._files.read(self.scheduler.kv_cache.disk.take_asked())",
        "self.scheduler.kv_cache.disk.take_asked()",
    ),
    _bug(
        "files are asked for when there are none any more",
        DISK,
        "            self._stored.clear()\n            for",
        "            self.enabled = True\n            for",
    ),
    _bug(
        "the last blocks get each other's names",
        f"{CORE}.unfiled",
        "            yield block_id, name\n",
        "            yield max(1, block_id - 1), name\n",
    ),
    _bug(
        "news of files are not recorded",
        RECORDER,
        "        self._journal.write(Heard(self._now(), news))\n",
        "",
    ),
)
