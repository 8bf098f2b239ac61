#!/usr/bin/env python3
"""Publishes a load with paho at QoS 1 and reports what was acknowledged.

Persistent sessions and paho's own resending: what an acknowledgement was not seen for is sent again after
a reconnect, as any careful device does.
"""

import argparse
import json
import sys
import threading
import time

import paho.mqtt.client as mqtt

from plan import Load


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
                self.publish(topic, payload, qos=1)
                return True
        return False


class Lane:
    def __init__(self, args, load, lane):
        self.lane, self.lanes, self.load, self.args = lane, args.lanes, load, args
        self.acked, self.sent, self.connects = 0, 0, 0
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

    def on_publish(self, _client, _userdata, _mid, _reason, _properties):
        self.acked += 1
        self.window.release()

    def run(self):
        deadline = time.monotonic() + self.args.deadline
        while True:
            try:
                self.client.connect(self.args.host, self.args.port, keepalive=self.args.keepalive)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self.client.loop_start()
        interval = self.args.lanes / self.args.rate if self.args.rate else 0
        due = time.monotonic()
        for message in self.load.messages(self.lane, self.lanes):
            if interval:
                due += interval
                time.sleep(max(0, due - time.monotonic()))
            while not self.window.acquire(timeout=1):
                if time.monotonic() > deadline:
                    return
            if not self.client.publish_in_order(message.topic, message.payload, deadline):
                return
            self.sent += 1
        while self.acked < self.sent and time.monotonic() < deadline:
            time.sleep(0.02)
        self.client.disconnect()
        self.client.loop_stop()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--start-us", type=int, required=True)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--readings", type=int, default=100_000)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--window", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0, help="messages a second; 0: as fast as acknowledged")
    parser.add_argument("--keepalive", type=int, default=30)
    parser.add_argument("--deadline", type=float, default=240)
    args = parser.parse_args()
    load = Load(args.seed, args.start_us, args.devices, args.readings)
    lanes = [Lane(args, load, lane) for lane in range(args.lanes)]
    threads = [threading.Thread(target=lane.run) for lane in lanes]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = {
        "sent": sum(lane.sent for lane in lanes),
        "acknowledged": sum(lane.acked for lane in lanes),
        "connects": sum(lane.connects for lane in lanes),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(report))
    sys.exit(0 if report["sent"] == report["acknowledged"] else 1)


if __name__ == "__main__":
    main()
