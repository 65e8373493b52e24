"""A Google Cloud Storage of our own on the loopback interface, for gcsfs and for Orbax's TensorStore.

Import the fixtures: `from tests.gcs import bucket, gcs`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import urllib.request
import uuid
from functools import partial
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "test-bucket"


class Handler(RequestHandler):
    """The emulator's, with the generations of objects that TensorStore's conditional reads and writes are made with.

    One request at a time: the emulator was not written for threads.
    """

    generation = ""

    def do_GET(self):
        with self.server.lock:
            url = urlsplit(self.path)
            asked = parse_qs(url.query)
            self.generation = (
                self.current(url.path.rpartition("/o/")[2]) if "media" in asked.get("alt", ()) else ""
            )
            if self.generation and asked.get("ifGenerationNotMatch") == [self.generation]:
                self.refuse(304)
            else:
                super().do_GET()

    def do_POST(self):
        with self.server.lock:
            asked = parse_qs(urlsplit(self.path).query)
            expected = asked.get("ifGenerationMatch")
            if expected and "name" in asked and expected != [self.current(asked["name"][0]) or "0"]:
                self.refuse(412)
            else:
                super().do_POST()

    def do_DELETE(self):
        with self.server.lock:
            super().do_DELETE()

    def current(self, name):
        """The generation of an object; empty if there is none."""
        try:
            return self.storage.get_file_obj(BUCKET, unquote(name))["generation"]
        except NotFound:
            return ""

    def refuse(self, status):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.generation = ""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self):
        if self.generation:
            self.send_header("x-goog-generation", self.generation)
        super().end_headers()

    def parse_request(self):
        self.generation = ""
        if not super().parse_request():
            return False
        # Requests that a test wants to see refused, maybe after a few of them.
        refused = self.server.refused
        if refused and refused["match"] in self.path and self.command in refused["methods"]:
            refused["after"] = refused.get("after", 0) - 1
            if refused["after"] < 0:
                self.refuse(refused["status"])
                return False
        return True


class Server(ThreadingHTTPServer):
    # A thread for each connection: clients open some that they do not use at once.
    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self.storage = Storage(use_memory_fs=True)
        self.lock = threading.RLock()
        self.refused = None
        buckets.create_bucket(BUCKET, self.storage)
        super().__init__(("127.0.0.1", 0), partial(Handler, self.storage))

    def handle_error(self, request, client_address):
        pass  # a client that has hung up


@pytest.fixture(scope="session")
def gcs():
    """The running server; everything in this process and in those that it starts takes it for the real one."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    settings = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "NO_GCE_CHECK": "true",  # no search for credentials of a cloud machine
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # needs an API that the emulator lacks
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bucket(gcs):
    """The name of an empty remote directory."""
    yield f"gs://{BUCKET}/{uuid.uuid4().hex[:8]}"
    gcs.refused = None


def objects(directory: str) -> list[str]:
    """What is in a remote directory, as the server says."""
    root = directory.removeprefix(f"gs://{BUCKET}/")
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o?prefix={root}/"
    with urllib.request.urlopen(url, timeout=20) as answer:
        items = json.load(answer).get("items", [])
    return sorted(os.path.relpath(item["name"], root) for item in items)
