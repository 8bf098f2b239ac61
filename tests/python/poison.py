#!/usr/bin/env python3
"""Writes records that no stage can read straight into Kafka, as a foreign program with a defect would.

In the middle somebody breaks a schema: the subject is freed of its compatibility, a version is registered that no
reader of ours can resolve, and a thousand records of it follow that are sound by themselves. Each record that Kafka acknowledged is a line `topic value-in-hexadecimal` of its journal.
"""

import argparse
import io
import json
import os
import random
import struct
import sys
import time
import urllib.request
import uuid

import fastavro
from confluent_kafka import Producer

READINGS, CHECKED = "device.telemetry.v1", "data_core.reading.v1"
# A burst fills one partition with nothing else.
BURST = 1_000
CONTENT = "application/vnd.schemaregistry.v1+json"


def ask(registry, path, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{registry}{path}", data, {"Content-Type": CONTENT}, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def schema_id(registry, topic):
    return ask(registry, f"/subjects/{topic}-value/versions/latest")["id"]


def break_schema(registry, deadline):
    """Registers what readers of the readings cannot resolve, however often the registry is away, and returns its id
    and schema."""
    subject = f"{READINGS}-value"
    while True:
        try:
            schema = json.loads(ask(registry, f"/subjects/{subject}/versions/1")["schema"])
            # Readers want `message_id` and have no default for it.
            schema["fields"] = [dict(f, name="id") if f["name"] == "message_id" else f for f in schema["fields"]]
            ask(registry, f"/config/{subject}", {"compatibility": "NONE"}, "PUT")
            number = ask(registry, f"/subjects/{subject}/versions", {"schema": json.dumps(schema)})["id"]
            ask(registry, f"/config/{subject}", {"compatibility": "FULL_TRANSITIVE"}, "PUT")
            return number, schema
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            print(f"the registry is away: {error}", file=sys.stderr)
            time.sleep(0.5)


def broken(rng, number, schema):
    """Yields readings for ever that are sound under the broken schema."""
    parsed = fastavro.parse_schema(schema)
    now_us = int(time.time() * 1_000_000)
    seq = 0
    while True:
        seq += 1
        body = io.BytesIO()
        fastavro.schemaless_writer(body, parsed, {
            "id": str(uuid.UUID(int=rng.getrandbits(128), version=4)), "trace_id": f"{rng.getrandbits(128):032x}",
            "identity": "sequence", "site_id": "north", "device_id": "foreign-1", "received_by": "foreign",
            "stream": "telemetry", "epoch": 1, "seq": seq, "occurred_at": now_us + seq, "received_at": now_us + seq,
            "flags": [], "measurements": [{"name": "temperature", "number": 91.0}]})
        yield b"\x00" + struct.pack(">I", number) + body.getvalue()


def values(rng, known, foreign):
    """Yields (topic, value) for ever: noise, a known schema with noise behind it, the schema of another
    topic, a schema that nobody registered."""
    number = 0
    while True:
        number += 1
        mark = b"poison %d" % number
        kind = rng.randrange(20)
        if kind == 0:
            value = b"\x00" + struct.pack(">I", 900_000 + rng.randrange(3)) + mark
        elif kind < 7:
            value = b"\x00" + struct.pack(">I", known) + b"\xff" * 12 + mark
        elif kind < 10:
            value = b"\x00" + struct.pack(">I", foreign) + b"\xff" * 12 + mark
        else:
            value = b"\x07" + rng.randbytes(rng.randrange(40)) + mark
        yield (CHECKED if rng.random() < 0.1 else READINGS), value


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--registry", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="records a second outside the burst")
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--journal", required=True, help="file of what was acknowledged")
    args = parser.parse_args()
    deadline = time.monotonic() + args.deadline
    rng = random.Random(args.seed)
    producer = Producer({
        "bootstrap.servers": args.kafka, "enable.idempotence": True, "acks": "all",
        # An outage must not make a record's fate unknown: it is tried until the deadline.
        "message.timeout.ms": int(args.deadline * 1000)})
    journal = open(args.journal, "a", buffering=1)
    failed = []

    def delivered(error, message):
        if error is not None:
            failed.append(str(error))
            return
        print(message.topic(), message.value().hex(), file=journal)

    middle = max(0, (args.count - BURST) // 2)
    source = values(rng, schema_id(args.registry, READINGS), schema_id(args.registry, "service_platform.alert.v1"))
    for index in range(args.count):
        topic, value = next(source)
        in_burst = middle <= index < middle + BURST
        if index == middle:
            breaking = broken(rng, *break_schema(args.registry, deadline))
        if in_burst:
            producer.produce(READINGS, value, key=b"poison", partition=args.seed % 6, on_delivery=delivered)
            producer.produce(READINGS, next(breaking), key=b"north/foreign-1", on_delivery=delivered)
        else:
            producer.produce(topic, value, key=b"poison/%d" % index, on_delivery=delivered)
            time.sleep(1 / args.rate)
        producer.poll(0)
        if time.monotonic() > deadline:
            break
    left = producer.flush(max(1.0, deadline - time.monotonic()))
    journal.flush()
    os.fsync(journal.fileno())
    if left or failed:
        sys.exit(f"{left} records without an answer, {len(failed)} failed: {failed[:3]}")


if __name__ == "__main__":
    main()
