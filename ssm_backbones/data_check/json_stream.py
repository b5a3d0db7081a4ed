"""Read a large JSON object without holding all of it: the elements of its arrays are returned one by one.

The annotations of COCO's training set are 450 MB of JSON, of which Python would make several gigabytes of objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_CHUNK = 1 << 20
_BLANKS = ' \t\r\n'


def read_members(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield the members of the JSON object in a file as pairs of key and value, in the file's order.

    An array at the top level is yielded element by element, each with the array's key, so that at most one element is
    held at a time. Empty arrays yield nothing.

    Raises:
        ValueError: If the file is not one valid JSON object. The message gives the place.
    """
    with open(path, encoding='utf-8') as file:
        reader = _Reader(file)
        reader.expect('{')
        if reader.peek() == '}':
            return
        while True:
            key = reader.value()
            if not isinstance(key, str):
                raise ValueError(f'expected a key at character {reader.offset}, found {key!r}')
            reader.expect(':')
            if reader.peek() == '[':
                yield from ((key, element) for element in reader.elements())
            else:
                yield key, reader.value()
            if reader.expect(',}') == '}':
                return


class _Reader:
    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ''
        self.position = 0
        self.before = 0
        self.ended = False
        decoder: Any = json.JSONDecoder()
        self.decode, self.scan = decoder.raw_decode, decoder.scan_once

    @property
    def offset(self) -> int:
        return self.before + self.position

    def peek(self) -> str:
        """Return the next character that is not blank, without taking it."""
        while True:
            text, position = self.text, self.position
            while position < len(text) and text[position] in _BLANKS:
                position += 1
            self.position = position
            if position < len(text):
                return text[position]
            if not self._read_on():
                raise ValueError(f'the file ends at character {self.offset}, within the object')

    def expect(self, expected: str) -> str:
        """Take the next character, which has to be one of ``expected``."""
        found = self.peek()
        if found not in expected:
            raise ValueError(f'expected {" or ".join(expected)} at character {self.offset}, found {found!r}')
        self.position += 1
        return found

    def value(self) -> Any:
        """Take the next value."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # Cut off by the end of what was read so far, or wrong: the rest of the file decides.
                if self._read_on():
                    continue
                raise ValueError(f'{error.msg} at character {self.before + error.pos}') from error
            # A number may go on in what was not read yet.
            if end == len(self.text) and self._read_on():
                continue
            self.position = end
            return value

    def elements(self) -> Iterator[Any]:
        """Take an array and yield its elements."""
        self.expect('[')
        if self.peek() == ']':
            self.position += 1
            return
        while True:
            yield from self._held_elements()
            yield self.value()
            if self.expect(',]') == ']':
                return

    def _held_elements(self) -> Iterator[Any]:
        """Take elements as long as each is held whole and followed by another one, which is what mostly happens."""
        text, position, scan = self.text, self.position, self.scan
        try:
            while text[position] == '{':
                value, end = scan(text, position)
                if text[end] != ',':
                    return
                position = end + (2 if text[end + 1] == ' ' else 1)
                self.position = position
                yield value
        except (IndexError, StopIteration, json.JSONDecodeError):
            # Cut off, or wrong: value() finds out.
            return

    def _read_on(self) -> bool:
        if self.ended:
            return False
        # A value that does not fit is read in ever larger parts, so that reading stays linear in its length.
        chunk = self.file.read(max(_CHUNK, len(self.text) - self.position))
        self.ended = not chunk
        self.before += self.position
        self.text = self.text[self.position :] + chunk
        self.position = 0
        return not self.ended
