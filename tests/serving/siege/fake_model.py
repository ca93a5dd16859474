"""A model process that needs no model: what it does with a message is what the message says."""

from __future__ import annotations

import os
import socket
import sys
import time

from image_classifier.serving.worker import framing


def main(descriptor: int) -> None:
    connection = socket.socket(fileno=descriptor)
    stream = connection.makefile("rb")
    spec, _ = framing.read(stream) or ({}, b"")
    starts = 0
    if "starts" in spec:  # a file that counts them
        with open(spec["starts"], "a+b") as file:
            starts = file.seek(0, os.SEEK_END)
            file.write(b"+")
    if starts:
        time.sleep(spec.get("slow_s", 0))
    connection.sendall(framing.encode({"ready": {"name": "fake", "version": "1", "classes": ["a"]}}))
    while message := framing.read(stream):
        head, body = message
        if head.get("do") == "canary" and 0 < starts <= spec.get("wrong", 0):
            connection.sendall(framing.encode({"id": head["id"], "failed": "another answer"}))
            continue
        if head.get("do") == "die":
            os._exit(9)
        if head.get("do") == "hang":
            time.sleep(3600)
        if head.get("do") == "wait":
            time.sleep(0.05)
        if "id" in head:
            connection.sendall(framing.encode({"id": head["id"], "pid": os.getpid(), "bytes": len(body)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
