"""Mutants that no test can tell from the original, and why."""

from __future__ import annotations

_SERIALS = "they only have to grow"
_IS_THERE = "a longer slice is empty if and only if the shorter one is"
_ONCE = "it is there once: within a scope its quotes are escaped"
_PRUNING = "the heap is only rebuilt a little earlier or later; its bound holds"
_TRUTH = "only whether it is true counts"
_AS_LONG = "one is made from the other, so they are of one length"
_LIMIT = "what is at the very limit, to a float's last digit, may be taken for either"
_NO_TIME = "neither is near any time that is left"
_BOUND = "there only has to be a bound"
_DIFFERS = "it only has to differ from what others of the line, or of the function, have"
_NEVER_ENTERED = "the block is made to have its time looked at, so its scope counts for nothing"
_FORKS = "it is there wherever there are forks"
_BOOTED = "it is -inf, or later than now, and the system has been up for longer than a second"
_POSITIONAL = "it is filled by its place, and nobody reads it"

EQUIVALENT: dict[str, dict[str, str]] = {
    "_clock": {
        "_now() - _now_about()  ->  _now() + _now_about()": "all it is to do is raise",
    },
    "_server.blocks": {
        "fits = whole <= left + max(late, min(_READ_LATE_AFTER, left / 100))  ->  "
        "fits = whole < left + max(late, min(_READ_LATE_AFTER, left / 100))": _LIMIT,
        "if least <= before <= left + max(late, _READ_LATE_AFTER) "
        "and (not (fits and before < whole)):  ->  "
        "if least <= before < left + max(late, _READ_LATE_AFTER) "
        "and (not (fits and before < whole)):": _LIMIT,
        "if least <= before <= left + max(late, _READ_LATE_AFTER) "
        "and (not (fits and before < whole)):  ->  "
        "if least < before <= left + max(late, _READ_LATE_AFTER) "
        "and (not (fits and before < whole)):": _LIMIT,
        "if least <= before <= left + max(late, _READ_LATE_AFTER) "
        "and (not (fits and before < whole)):  ->  "
        "if least <= before <= left + max(late, _READ_LATE_AFTER) "
        "and (not (fits and before <= whole)):": "both are returned where they are equal",
        "if rounded <= left + max(_READ_AFTER, late):  ->  "
        "if rounded < left + max(_READ_AFTER, late):": _LIMIT,
        "self.longest = -1.0  ->  self.longest = -2.0": "no duration is less",
        "self.whole = -math.inf  ->  self.whole = +math.inf": _NO_TIME,
        "block.whole = after if after.is_integer() else -math.inf  ->  "
        "block.whole = after if after.is_integer() else +math.inf": _NO_TIME,
        "if since is not None and now - since > self.longest:  ->  "
        "if since is not None and now - since >= self.longest:": "it is set to what it is",
        "if 0 <= block.whole - left <= _READ_LATE_AFTER:  ->  "
        "if 0 <= block.whole - left < _READ_LATE_AFTER:": _LIMIT,
        "if left > _NEVER:  ->  if left >= _NEVER:": _LIMIT,
        "if after > block.after:  ->  if after >= block.after:": "it is set to what it is",
    },
    "_server.table": {
        "def acquire(self, worker: _Worker, scope: str, request: _Request, deadline: float, "
        "now: float=0.0) -> bool:  ->  "
        "def acquire(self, worker: _Worker, scope: str, request: _Request, deadline: float, "
        "now: float=1.0) -> bool:": "whoever asks since when a timer is held has said it",
        "for _, _, worker, scope in sorted(due, key=lambda entry: entry[:2]):  ->  "
        "for _, _, worker, scope in sorted(due, key=lambda entry: entry[:3]):": (
            "serials differ, so the third is never compared"
        ),
        "self._serial = 0  ->  self._serial = 1": _SERIALS,
        "self._serial += 1  ->  self._serial += 2": _SERIALS,
        "if len(self._heap) > 2 * self._size + _HEAP_SLACK:  ->  "
        "if len(self._heap) >= 2 * self._size + _HEAP_SLACK:": _PRUNING,
        "if len(self._heap) > 2 * self._size + _HEAP_SLACK:  ->  "
        "if len(self._heap) > 2 * self._size - _HEAP_SLACK:": _PRUNING,
    },
    "_transport.wire": {
        """return b'"expiration_time": %a'.join(line.rsplit(b'"expiration_time": 0', 1))  ->  """
        """return b'"expiration_time": %a'.join(line.rsplit(b'"expiration_time": 0'))""": _ONCE,
        """return b'"expiration_time": %a'.join(line.rsplit(b'"expiration_time": 0', 1))  ->  """
        """return b'"expiration_time": %a'.join(line.rsplit(b'"expiration_time": 0', 2))""": _ONCE,
        "getattr(os, 'register_at_fork', dict)(before=_forget_pid, after_in_child=_forget_pid)"
        "  ->  "
        "getattr(os, 'register_at_fork')(before=_forget_pid, after_in_child=_forget_pid)": _FORKS,
        "if start <= 0:  ->  if start < 0:": (
            "at 0 the same text is read again, and refused for the same reason"
        ),
    },
    "_command.block_table": {
        "unit = 3600 if seconds <= 86400 else 86400  ->  "
        "unit = 3600 if seconds < 86400 else 86400": "a day is 24 hours",
        "widths = [max(map(len, column)) for column in zip(*rows, strict=True)]  ->  "
        "widths = [max(map(len, column)) for column in zip(*rows, strict=False)]": _AS_LONG,
    },
    "_command.hangs": {
        "return False  ->  return None": _TRUTH,
    },
    "_evidence.picture": {
        "return [Seen(member, place, place is not None and _waits(place, waiting), "
        "_passes(member, blocks[member['host']])) "
        "for (_, member), place in zip(found, places, strict=True)]  ->  "
        "return [Seen(member, place, place is not None and _waits(place, waiting), "
        "_passes(member, blocks[member['host']])) "
        "for (_, member), place in zip(found, places, strict=False)]": _AS_LONG,
        "inside = Counter((one.passes[block] "
        "for one, scope in zip(seen, scopes, strict=True) if scope == block))  ->  "
        "inside = Counter((one.passes[block] "
        "for one, scope in zip(seen, scopes, strict=False) if scope == block))": _AS_LONG,
        "_NOBODY: _Verdict = (frozenset(), '')  ->  _NOBODY: _Verdict = (frozenset(), 'X')": (
            "why nobody is a suspect by a rule is told nowhere"
        ),
        "rules.insert(0, rules.pop())  ->  rules.insert(1, rules.pop())": (
            "of two ranks none is behind, as one is not less than half of them"
        ),
        "return 0 < 2 * len(found) < len(seen)  ->  return 1 < 2 * len(found) < len(seen)": (
            "it is an even number"
        ),
    },
    "_evidence.expiry": {
        "return False  ->  return None": _TRUTH,
    },
    "_evidence.place": {
        "return False  ->  return None": _TRUTH,
    },
    "_command.torchrun": {
        "result.add_argument('training_script')  ->  "
        "result.add_argument('training_scriptX')": _POSITIONAL,
        "result.add_argument('training_script_args', nargs=argparse.REMAINDER)  ->  "
        "result.add_argument('training_script_argsX', nargs=argparse.REMAINDER)": _POSITIONAL,
        "names = dict.fromkeys([f'--{name}', f'--{dest}', _SHORT.get(name, f'--{name}')])  ->  "
        "names = dict.fromkeys([f'--{name}', f'--{dest}', _SHORT.get(name, f'--X{name}')])": (
            "torchrun itself refuses such an option"
        ),
        "if command[:1] == ['-m'] and command[1:2] and (command[1] in _MODULES):  ->  "
        "if command[:1] == ['-m'] and command[1:3] and (command[1] in _MODULES):": _IS_THERE,
        "is_script = command[:1] and basename(command[0]) == 'torchrun'  ->  "
        "is_script = command[:2] and basename(command[0]) == 'torchrun'": _IS_THERE,
    },
    "_server.job": {
        "values = (environment.get(name, '') for name in names)  ->  "
        "values = (environment.get(name, 'X') for name in names)": "neither is a number",
    },
    "_server.workers": {
        "if abs(difference - self._difference) > _CLOCK_STEP:  ->  "
        "if abs(difference - self._difference) >= _CLOCK_STEP:": (
            "a step of the very limit may be taken for either"
        ),
        "if after - before < _CLOCK_STEP / 2:  ->  if after - before <= _CLOCK_STEP / 2:": _LIMIT,
        "if after - before < _CLOCK_STEP / 2:  ->  if after - before < _CLOCK_STEP / 3:": (
            "what is a pause is known within a factor of two"
        ),
    },
    "api": {
        "if not 0 <= self._after <= _LONGEST:  ->  if not 0 <= self._after < _LONGEST:": _LIMIT,
        "handle_of(self._hold).extend(expires(after, '')._after * _scale)  ->  "
        "handle_of(self._hold).extend(expires(after)._after * _scale)": _NEVER_ENTERED,
        "handle_of(self._hold).extend(expires(after, '')._after * _scale)  ->  "
        "handle_of(self._hold).extend(expires(after, 'X')._after * _scale)": _NEVER_ENTERED,
        "if monotonic() >= hold.quiet_until:  ->  if monotonic() > hold.quiet_until:": _LIMIT,
        "its_place += f'@{count}'  ->  its_place += f'@X{count}'": _DIFFERS,
        "wrapper.__elastic_timer__ = count + 1  ->  wrapper.__elastic_timer__ = count - 1": (
            _DIFFERS
        ),
        "wrapper.__elastic_timer__ = count + 1  ->  wrapper.__elastic_timer__ = count + 2": (
            _DIFFERS
        ),
    },
    "_worker.handles": {
        "NEVER = 1000000000000.0  ->  NEVER = 1000000000001.0": _NO_TIME,
        "_TRIES = 10  ->  _TRIES = 11": _BOUND,
        "if hold.entered < _forked_at:  ->  if hold.entered <= _forked_at:": _LIMIT,
        "if hold is None or hold.entered < _forked_at:  ->  "
        "if hold is None or hold.entered <= _forked_at:": _LIMIT,
        "getattr(os, 'register_at_fork', dict)(after_in_child=_forget_parent)  ->  "
        "getattr(os, 'register_at_fork')(after_in_child=_forget_parent)": _FORKS,
    },
    "_worker.optional": {
        "_warnings_left = [True]  ->  _warnings_left = [False]": "only whether there is one counts",
        "if not was_armed and monotonic() < self._look_at:  ->  "
        "if not was_armed and monotonic() <= self._look_at:": _LIMIT,
        "if scope_id not in self._armed and monotonic() < self._look_at:  ->  "
        "if scope_id not in self._armed and monotonic() <= self._look_at:": _LIMIT,
        "return False  ->  return None": _TRUTH,
        "if self._look_at > 0:  ->  if self._look_at >= 0:": _BOOTED,
        "if self._look_at > 0:  ->  if self._look_at > 1:": _BOOTED,
    },
    "_worker.scopes": {
        "_MOST_PLACES = 1000  ->  _MOST_PLACES = 1001": _BOUND,
        "if len(_places) >= _MOST_PLACES:  ->  if len(_places) > _MOST_PLACES:": _BOUND,
        "found += f'@{offset}'  ->  found += f'@X{offset}'": _DIFFERS,
        "loop = getattr(asyncio, '_get_running_loop', lambda: None)()  ->  "
        "loop = getattr(asyncio, '_get_running_loop')()": (
            "it is missing only while another thread is importing asyncio"
        ),
        "task = None if loop is None else asyncio.current_task(loop)  ->  "
        "task = None if loop is None else asyncio.current_task()": (
            "without an argument it takes the running loop, which this one is"
        ),
    },
}
