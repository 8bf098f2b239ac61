#!/usr/bin/env python3
"""Publishes a load with paho at QoS 1 and reports what was acknowledged.

Persistent sessions and paho's own resending: what an acknowledgement was not seen for is sent again after
a reconnect, as any careful device does. With a journal it goes on after a kill as well: what the journal
does not know as acknowledged is sent, in order.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections import deque

import paho.mqtt.client as mqtt

from journal import Journal, lane_path
from plan import Load

# Messages that one line of the journal announces: a line is a write to the disk.
ANNOUNCED = 500
# Between two writes of acknowledgements to the disk.
JOURNAL_INTERVAL_S = 0.05


class OrderedClient(mqtt.Client):
    """Publishes nothing new until what is open was sent again after a reconnect.

    paho sends a new publish as soon as there is a socket, before CONNACK and before its repeats, which changes
    the order of a device's readings.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.resumed = threading.Condition()
        self.is_resumed = False
        self.on_disconnect = self.interrupted

    def _handle_connack(self):
        rc = super()._handle_connack()
        with self.resumed:
            self.is_resumed = True
            self.resumed.notify_all()
        return rc

    def interrupted(self, *_):
        with self.resumed:
            self.is_resumed = False

    def publish_in_order(self, topic, payload, deadline):
        with self.resumed:
            if self.resumed.wait_for(lambda: self.is_resumed, timeout=max(0, deadline - time.monotonic())):
                return self.publish(topic, payload, qos=1)
        return None


class Lane:
    def __init__(self, args, load, lane):
        self.lane, self.lanes, self.load, self.args = lane, args.lanes, load, args
        self.journal = Journal(lane_path(args.journal, lane)) if args.journal else None
        self.earlier = len(self.journal.acknowledged) if self.journal else 0
        self.acked, self.sent, self.connects = 0, 0, 0
        # paho's number of a publish that is open, to ours; numbers that were acknowledged and are not yet
        # in the journal.
        self.open, self.answered = {}, deque()
        self.window = threading.Semaphore(args.window)
        self.done = threading.Event()
        self.client = OrderedClient(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=f"publisher-{load.seed}-{lane}",
            clean_session=False,
            protocol=mqtt.MQTTv311,
        )
        self.client.max_inflight_messages_set(args.window)
        self.client.max_queued_messages_set(0)
        self.client.reconnect_delay_set(0.2, 1)
        self.client.on_connect = self.on_connect
        self.client.on_publish = self.on_publish

    def on_connect(self, _client, _userdata, _flags, reason, _properties):
        self.connects += 1
        if reason.is_failure:
            print(f"lane {self.lane}: refused: {reason}", file=sys.stderr)

    def on_publish(self, _client, _userdata, mid, _reason, _properties):
        self.acked += 1
        if self.journal:
            self.answered.append(mid)
        self.window.release()

    def keep_journal(self):
        """Takes acknowledgements to the disk until the lane has ended."""
        while not self.done.wait(JOURNAL_INTERVAL_S):
            self.write_answers()
        self.write_answers()

    def write_answers(self):
        numbers = []
        for _ in range(len(self.answered)):
            mid = self.answered.popleft()
            number = self.open.pop(mid, None)
            if number is None:
                # Acknowledged before `run` could note it: in the next turn.
                self.answered.append(mid)
            else:
                numbers.append(number)
        if numbers:
            self.journal.acknowledge(numbers)

    def totals(self):
        """Returns how many publishes were made and acknowledged, those of processes before this one too."""
        if self.journal is None:
            return self.sent, self.acked
        return self.earlier + self.sent, len(self.journal.acknowledged)

    def unacknowledged(self):
        """Yields the messages to send with their numbers, each announced to the journal before."""
        for number, message in enumerate(self.load.messages(self.lane, self.lanes)):
            if self.journal:
                if number in self.journal.acknowledged:
                    continue
                if number >= self.journal.intended:
                    self.journal.intend(number + ANNOUNCED)
            yield number, message

    def run(self):
        deadline = time.monotonic() + self.args.deadline
        while True:
            try:
                self.client.connect(self.args.host, self.args.port[self.lane % len(self.args.port)], keepalive=self.args.keepalive)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self.client.loop_start()
        keeper = threading.Thread(target=self.keep_journal) if self.journal else None
        if keeper:
            keeper.start()
        try:
            self.send(deadline)
        finally:
            self.done.set()
            if keeper:
                keeper.join()
        self.client.disconnect()
        self.client.loop_stop()

    def send(self, deadline):
        interval = self.args.lanes / self.args.rate if self.args.rate else 0
        due = time.monotonic()
        for number, message in self.unacknowledged():
            if interval:
                due += interval
                time.sleep(max(0, due - time.monotonic()))
            while not self.window.acquire(timeout=1):
                if time.monotonic() > deadline:
                    return
            published = self.client.publish_in_order(message.topic, message.payload, deadline)
            if published is None:
                return
            self.open[published.mid] = number
            self.sent += 1
        while self.acked < self.sent and time.monotonic() < deadline:
            time.sleep(0.02)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=lambda text: [int(port) for port in text.split(",")], required=True,
                        help="several with commas between: each lane takes one of them")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--start-us", type=int, required=True)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--readings", type=int, default=100_000)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--window", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0, help="messages a second; 0: as fast as acknowledged")
    parser.add_argument("--keepalive", type=int, default=30)
    parser.add_argument("--deadline", type=float, default=240)
    parser.add_argument("--journal", help="directory of the journal, which is made; one that is there is gone on with")
    parser.add_argument("--mix", action="store_true", help="some devices are odd: see plan.py")
    args = parser.parse_args()
    if args.journal:
        os.makedirs(args.journal, exist_ok=True)
    load = Load(args.seed, args.start_us, args.devices, args.readings, mix=args.mix)
    lanes = [Lane(args, load, lane) for lane in range(args.lanes)]
    threads = [threading.Thread(target=lane.run) for lane in lanes]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = {
        "sent": sum(lane.totals()[0] for lane in lanes),
        "acknowledged": sum(lane.totals()[1] for lane in lanes),
        "connects": sum(lane.connects for lane in lanes),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(report))
    sys.exit(0 if report["sent"] == report["acknowledged"] else 1)


if __name__ == "__main__":
    main()
