#!/usr/bin/env python3
"""A webhook that takes alerts, keeps a journal of what it answered with 200, and fails now and then.

One alert in a hundred is refused with 503 the first two times it comes, while the others pass. A line of the journal is
on the disk before its answer goes out: `key state site device alert`, numbered by nobody, repeats included.
"""

import argparse
import json
import os
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Of so many alerts one is weak, and is taken when it comes for the so-manieth time.
WEAK, TAKEN_AT = 100, 3


class Receiver(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, port, journal):
        super().__init__(("127.0.0.1", port), Handler)
        self.journal = open(journal, "ab")
        self.lock = threading.Lock()
        self.seen = Counter()

    def take(self, key, alert):
        with self.lock:
            self.seen[key] += 1
            if zlib.crc32(key.encode()) % WEAK == 0 and self.seen[key] < TAKEN_AT:
                return 503
            words = (key, alert["state"], alert["site_id"], alert["device_id"], alert["alert_id"])
            self.journal.write((" ".join(words) + "\n").encode())
            self.journal.flush()
            os.fsync(self.journal.fileno())
        return 200


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        alert = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.take(self.headers["Idempotency-Key"], alert)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", required=True)
    args = parser.parse_args()
    Receiver(args.port, args.journal).serve_forever()


if __name__ == "__main__":
    main()
