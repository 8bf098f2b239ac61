"""What a writer intended and what was acknowledged to it, on disk before anybody relies on it.

Lines of text: `i N`: from now on messages below N may have been sent; `a N`: message N was acknowledged.
"""

import os
import threading


class Journal:
    """Opens a journal, or goes on with one that a kill may have cut within a line."""

    def __init__(self, path):
        self.intended, self.acknowledged = read(path)
        self.file = open(path, "ab")
        self.file.truncate(whole_bytes(path))
        self.lock = threading.Lock()

    def intend(self, below):
        """Returns when the disk has it."""
        self.intended = below
        self.write(f"i {below}\n")

    def acknowledge(self, numbers):
        self.acknowledged.update(numbers)
        self.write("".join(f"a {number}\n" for number in numbers))

    def write(self, text):
        with self.lock:
            self.file.write(text.encode())
            self.file.flush()
            os.fsync(self.file.fileno())


def whole_bytes(path):
    """Returns how many bytes of a journal are complete lines."""
    with open(path, "rb") as file:
        return file.read().rfind(b"\n") + 1


def read(path):
    """Returns the first message that was not intended and the messages that were acknowledged."""
    intended, acknowledged = 0, set()
    if not os.path.exists(path):
        return intended, acknowledged
    with open(path, "rb") as file:
        lines = file.read(whole_bytes(path)).splitlines()
    for line in lines:
        kind, number = line.split()
        if kind == b"i":
            intended = int(number)
        else:
            acknowledged.add(int(number))
    return intended, acknowledged


def lane_path(directory, lane):
    return os.path.join(directory, f"lane-{lane}.journal")
