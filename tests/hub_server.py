"""A stand-in of the model hub on this machine: as much of its API as an upload takes.

with Hub() as hub:
    ...                             # HF_ENDPOINT=hub.address, HF_TOKEN=hub.token
    hub.repositories["me/it"].files # {path: bytes}
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c" * 40


class Repository:
    """What the hub holds under one name."""

    def __init__(self, private: bool):
        self.private = private
        self.files = {}


class Hub:
    """The server, for as long as the block runs. `me` is in the organisation `org`."""

    def __init__(self):
        self.token, self.role = "hf_standin", "write"
        self.repositories: dict[str, Repository] = {}
        self.objects = {}  # of LFS, by sha256
        self.requests = []  # "METHOD path" of all that was asked
        self.refuses = ""  # an upload's path that ends so is answered with status 507

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer({})

    def do_GET(self):
        self.serve()

    def do_POST(self):
        self.serve()

    def do_PUT(self):
        self.serve()

    def answer(self, content, status=200, code=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self):
        hub, path = self.hub, urlsplit(self.path).path
        body = self.read()
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/objects/"):  # signed addresses need no token
            if hub.refuses and path.endswith(hub.refuses):
                return self.answer({"error": "no room"}, 507)
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/objects/")
            hub.objects[path.removeprefix("/objects/")] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if hub.refuses and path.endswith(hub.refuses):
            return self.answer({"error": "no room"}, 507)
        if path == "/api/whoami-v2":
            token = {"displayName": "test", "role": hub.role}
            found = {"type": "user", "name": "me", "orgs": [{"name": "org"}]}
            return self.answer(found | {"auth": {"type": "access_token", "accessToken": token}})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = path.split("/models/")[-1] if "/models/" in path else path[1:].partition(".git")[0]
        name = "/".join(name.split("/")[:2])
        if name not in hub.repositories:
            return self.answer({"error": "Repository not found"}, 404, code="RepoNotFound")
        repository = hub.repositories[name]
        if path == f"/api/models/{name}":
            facts = {"id": name, "modelId": name, "private": repository.private, "tags": []}
            return self.answer(facts | {"sha": COMMIT, "siblings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.answer({"files": [self.mode(each["path"]) for each in files]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.lfs(each) for each in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            return self.commit(name, body)
        return self.answer({"error": f"no such address here: {path}"}, 404)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def create(self, wanted):
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repositories:
            found = {
                "error": "You already created this model repo",
                "url": f"{self.hub.address}/{name}",
            }
            return self.answer(found, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(bool(private))
        return self.answer({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def mode(self, path):
        is_large = path.endswith((".safetensors", ".png"))
        mode = "lfs" if is_large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def lfs(self, wanted):
        target = {"href": f"{self.hub.address}/objects/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": target}}

    def commit(self, name, body):
        files = self.hub.repositories[name].files
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        address = f"{self.hub.address}/{name}/commit/{COMMIT}"
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": address})
