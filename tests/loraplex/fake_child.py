"""A stand-in for a shard or a router: answers its health check and otherwise does as its flags say.

Every start, SIGTERM and death goes as a line `role event pid` into the journal.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from loraplex import lifeline

KEPT: list[object] = []
"""Servers end when nobody refers to them."""


def main() -> None:
    options = parse()
    journal(options, "start")
    if len(starts(options)) <= options.refusals:
        print("the model is too round")
        sys.exit(2)
    if options.grandchild:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
        options.grandchild.write_text(str(sleeper.pid))
    lifeline.watch()
    signal.signal(signal.SIGTERM, lambda *_: stop(options))
    if len(starts(options)) <= options.deaths:
        threading.Thread(target=die_soon, args=(options,), daemon=True).start()
    {"shard": serve_grpc, "router": serve_http}[options.role](options.port)
    print("up")
    while True:
        time.sleep(60)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("shard", "router"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--refusals", type=int, default=0, help="exit with code 2 in so many first runs")
    parser.add_argument("--deaths", type=int, default=0, help="die in so many first runs")
    parser.add_argument("--die-after", type=float, default=1.0)
    parser.add_argument("--drain", type=float, default=0.0, help="seconds between SIGTERM and exit")
    parser.add_argument("--grandchild", type=Path, help="start a sleeper and write its pid here")
    return parser.parse_args()


def journal(options: argparse.Namespace, event: str) -> None:
    with options.journal.open("a") as file:
        file.write(f"{options.role} {event} {os.getpid()}\n")


def starts(options: argparse.Namespace) -> list[str]:
    return [
        line for line in options.journal.read_text().splitlines() if line.startswith(f"{options.role} start")
    ]


def stop(options: argparse.Namespace) -> None:
    journal(options, "term")
    time.sleep(options.drain)
    journal(options, "exit")
    os._exit(0)


def die_soon(options: argparse.Namespace) -> None:
    time.sleep(options.die_after)
    print("the disk is on fire", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def serve_grpc(port: int) -> None:
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    server.start()
    KEPT.append(server)


def serve_http(port: int) -> None:
    server = HTTPServer(("127.0.0.1", port), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        print(format % args)


if __name__ == "__main__":
    main()
