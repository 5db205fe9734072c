"""A stand-in for the Weights & Biases server, on this machine alone: runs, sweeps and agents, without an account.

It speaks as much of W&B's GraphQL and file-stream interface as its SDK asks for (tried: wandb 0.31) in init, log and
finish, sweep, agent, sync, and the reading of a sweep; it keeps everything in memory, and fails on request. What it
cannot answer it refuses by name in `unknown`, so that a new SDK's new question is seen.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

KEY = "0123456789abcdef0123456789abcdef01234567"
OPERATION = re.compile(r"(?:query|mutation)\s*(\w*)\s*(?:\([^)]*\))?\s*\{\s*(?:\w+\s*:\s*)?(\w+)")
HISTORY = "wandb-history.jsonl"


class Server:
    """The server and all that it was told. Use as a context manager.

    `failures` are [part of a request's name, status or None (the connection is cut), how many]. The sweep's trials take
    the settings of `trials`, or those of its grid; a trial is stopped after `stop_after` validations, and learns of it
    by the agent or, if it is one of `told_by_stream`, as an answer to its own rows.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.runs: dict[str, dict] = {}
        self.sweeps: dict[str, dict] = {}
        self.agents: dict[str, str] = {}
        self.failures: list[list] = []
        self.requests: list[tuple[str, int]] = []
        self.unknown: list[str] = []
        self.trials: list[dict] = []
        self.stop_after, self.told_by_stream = math.inf, set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self._server.handle_error = lambda *_: None  # of clients that have gone
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """The variables that send the SDK here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def run(self, name: str) -> dict:
        """A run by its name (W&B's id), made if it is not there."""
        empty = {"name": name, "state": "pending", "config": {}, "summary": {}, "sweep": None, "history": [],
                 "streams": {}, "files": {}, "exitcode": None, "upserts": 0, "project": ""}  # fmt: skip
        return self.runs.setdefault(name, empty)

    def stopped(self, run: dict) -> bool:
        return sum("validation_loss" in row for row in run["history"]) >= self.stop_after

    def stream(self, name: str, body: dict) -> dict:
        """A piece of a run's files, each placed at its offset, so that one sent twice counts once."""
        run = self.run(name)
        for file, piece in (body.get("files") or {}).items():
            lines, offset, content = run["streams"].setdefault(file, []), piece.get("offset", 0), piece["content"]
            lines[offset : offset + len(content)] = content
        run["history"] = [json.loads(line) for line in run["streams"].get(HISTORY, [])]
        if last := run["streams"].get("wandb-summary.json"):
            run["summary"] = json.loads(last[-1])
        if body.get("complete"):
            run["exitcode"] = body.get("exitcode")
            run["state"] = "failed" if run["exitcode"] else "finished"
        return {"stopped": True} if name in self.told_by_stream and self.stopped(run) else {}

    # GraphQL: one method a top-level field

    def answer(self, query: str, variables: dict) -> dict:
        operation = OPERATION.search(query)
        field = operation[2] if operation else ""
        method = getattr(self, "_on_" + re.sub("([A-Z])", r"_\1", field).lower(), None)
        with self.lock:
            data = method(variables, query) if method else None
            if data is None:
                self.unknown.append(" ".join(query.split())[:300])
                return {"errors": [{"message": f"no answer to {field!r}"}]}
        return {"data": data}

    def _on_viewer(self, variables: dict, query: str) -> dict:
        teams = {"edges": [{"node": {"name": "team"}}]}
        viewer = {"id": "1", "entity": "team", "username": "reader", "name": "Reader", "email": "", "admin": False}
        return {"viewer": viewer | {"flags": "{}", "teams": teams}} | self._on_server_info({}, "")

    def _on_server_info(self, variables: dict, query: str) -> dict:
        latest = {"latestVersionString": "0.80.0", "versionOnThisInstanceString": "0.80.0"}
        versions = {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": latest}
        return {"serverInfo": versions | {"features": []}}

    def _on_entity(self, variables: dict, query: str) -> dict:
        return {"entity": {"organization": None}}

    def _on_upsert_bucket(self, variables: dict, query: str) -> dict:
        name = variables.get("name") or f"run{len(self.runs):05}"
        inserted, run = name not in self.runs, self.run(name)
        run |= {"upserts": run["upserts"] + 1, "project": variables.get("project") or run["project"] or "none"}
        run["state"] = "running" if run["state"] == "pending" else run["state"]
        run["sweep"] = variables.get("sweep") or run["sweep"]
        run["group"] = variables.get("groupName") or run.get("group")
        if variables.get("config"):
            run["config"] |= {key: entry.get("value") for key, entry in json.loads(variables["config"]).items()}
        run["summary"] |= json.loads(variables.get("summaryMetrics") or "{}")
        owner = {"id": "p", "name": run["project"], "entity": {"id": "e", "name": "team"}}
        bucket = {"id": f"id-{name}", "name": name, "displayName": variables.get("displayName") or name}
        bucket |= {"description": "", "config": variables.get("config") or "{}", "sweepName": run["sweep"]}
        bucket |= {"project": owner, "historyLineCount": len(run["streams"].get(HISTORY, []))}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_model(self, variables: dict, query: str) -> dict:
        run, bucket = self.runs.get(variables["name"]), None
        if run and run["upserts"]:
            lines = run["streams"].get(HISTORY, [])
            counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
            bucket = {"id": f"id-{run['name']}", "name": run["name"], "summaryMetrics": json.dumps(run["summary"])}
            bucket |= counts | {"displayName": run["name"], "config": "{}", "tags": [], "notes": ""}
            bucket |= {"historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
        owner = {"id": "e", "name": "team"}
        return {"model": {"id": "p", "name": variables.get("project"), "entity": owner, "bucket": bucket}}

    def _on_create_run_files(self, variables: dict, query: str) -> dict:
        where = f"{self.url}/storage/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{where}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": f"id-{variables['run']}", "uploadHeaders": [], "files": files}}

    def _on_mark_run_files_uploaded(self, variables: dict, query: str) -> dict:
        return {"markRunFilesUploaded": {"success": True}}

    def _on_upsert_sweep(self, variables: dict, query: str) -> dict:
        name, spec = f"sweep{len(self.sweeps):03}", yaml.safe_load(variables["config"])
        project = variables.get("projectName") or "none"
        self.sweeps[name] = {"spec": spec, "project": project, "state": "RUNNING", "started": 0}
        made = {"name": name, "project": {"id": "p", "name": project, "entity": {"id": "e", "name": "team"}}}
        return {"upsertSweep": {"sweep": made, "configValidationWarnings": []}}

    def _on_project(self, variables: dict, query: str) -> dict | None:
        name = variables.get("sweep") or variables.get("name")
        if "sweep(" not in query:
            return {"project": {"internalId": "1", "readOnly": False} | self._page(variables)}
        sweep = self.sweeps.get(name)
        if sweep is None or variables.get("project") not in (None, sweep["project"]):
            return {"project": {"sweep": None}}
        runs = [{"node": self._node(run)} for run in self.runs.values() if run["sweep"] == name]
        facts = {"id": f"id-{name}", "name": name, "method": sweep["spec"]["method"], "state": sweep["state"]}
        facts |= {"config": yaml.safe_dump(sweep["spec"]), "createdAt": "2026-01-01T00:00:00", "runCount": len(runs)}
        unset = ("description", "heartbeatAt", "updatedAt", "bestLoss", "controller", "scheduler", "displayName",
                 "controllerRunName", "runCountExpected")  # fmt: skip
        facts |= dict.fromkeys(unset) | {"earlyStopJobRunning": False, "runs": {"edges": runs}}
        return {"project": {"sweep": facts}}

    def _page(self, variables: dict) -> dict:
        """The runs of a sweep, best first where an order by a number of the summary is asked for."""
        wanted = re.search(r'"sweep": ?"(\w+)"', variables.get("filters") or "")
        chosen = [run for run in self.runs.values() if not wanted or run["sweep"] == wanted[1]]
        if "summary_metrics." in (order := variables.get("order") or ""):
            metric, sign = order.partition("summary_metrics.")[2], -1 if order.startswith("-") else 1
            chosen.sort(key=lambda run: sign * run["summary"].get(metric, math.inf * sign))
        edges = [{"node": self._node(run), "cursor": str(number)} for number, run in enumerate(chosen)]
        info = {"endCursor": str(len(edges)), "hasNextPage": False}
        return {"runCount": len(edges), "runs": {"edges": edges, "pageInfo": info}}

    def _node(self, run: dict) -> dict:
        node = {"name": run["name"], "displayName": run["name"], "id": f"id-{run['name']}", "state": run["state"]}
        node |= {"config": json.dumps({key: {"value": value} for key, value in run["config"].items()})}
        node |= {"summaryMetrics": json.dumps(run["summary"]), "systemMetrics": "{}", "sweepName": run["sweep"]}
        node |= {"heartbeatAt": "2026-01-01T00:00:00", "createdAt": "2026-01-01T00:00:00", "tags": []}
        unset = ("historyKeys", "commit", "readOnly", "description", "notes", "jobType", "group", "exitcode")
        user = {"name": "Reader", "username": "reader"}
        return node | dict.fromkeys(unset) | {"user": user, "projectId": "1", "historyLineCount": len(run["history"])}

    def _on_create_agent(self, variables: dict, query: str) -> dict:
        agent = f"agent-{len(self.agents) + 1}"
        self.agents[agent] = variables["sweep"].removeprefix("id-")
        self.sweeps[self.agents[agent]]
        return {"createAgent": {"agent": {"id": agent}}}

    def _on_agent_heartbeat(self, variables: dict, query: str) -> dict:
        """What an agent is to do: one trial at a time, an end to stopped ones, and to leave when nothing is left."""
        name = self.agents[variables["id"]]
        sweep, running = self.sweeps[name], json.loads(variables.get("runState") or "{}")
        if running:
            ended = [run for run in {*running} - self.told_by_stream if self.stopped(self.run(run))]
            commands = [{"type": "stop", "run_id": run} for run in ended]
        elif (settings := self._settings(sweep)) is None:
            sweep["state"], commands = "FINISHED", [{"type": "exit"}]
        else:
            sweep["started"] += 1
            run = f"trial{sweep['started']:03}"
            self.run(run).update(sweep=name, args=settings)
            values = {key: {"value": value} for key, value in settings.items()}
            commands = [{"type": "run", "run_id": run, "program": sweep["spec"].get("program", ""), "args": values}]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _settings(self, sweep: dict) -> dict | None:
        """The settings of a sweep's next trial, None where none is left."""
        parameters, number = sweep["spec"]["parameters"], sweep["started"]
        values = [parameter.get("values", [parameter.get("value")]) for parameter in parameters.values()]
        grid = [dict(zip(parameters, chosen, strict=True)) for chosen in itertools.product(*values)]
        plan = self.trials or grid
        return plan[number] if number < min(len(plan), sweep["spec"].get("run_cap", len(plan))) else None


class _Handler(BaseHTTPRequestHandler):
    server_of: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Nothing to the terminal."""

    def do_GET(self) -> None:
        self._body()
        self._send(self.path, 404, {})

    def do_PUT(self) -> None:
        body, parts = self._body(), unquote(urlsplit(self.path).path).split("/", 3)
        if not self._fails(self.path):
            with self.server_of.lock:
                self.server_of.run(parts[2])["files"][parts[3]] = body.decode(errors="replace")
            self._send(self.path, 200, {})

    def do_POST(self) -> None:
        raw, path = self._body(), unquote(urlsplit(self.path).path)
        if path.startswith("/sdk/otel/"):  # the SDK's own telemetry
            self._send(path, 200, {})
            return
        body = json.loads(raw or b"{}")
        operation = OPERATION.search(body.get("query", ""))
        name = "/".join(filter(None, operation.groups())) if operation else path
        expected = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
        if self.headers.get("Authorization") != expected:
            self._send(name, 401, {"errors": [{"message": "user is not logged in", "path": ["viewer"]}]})
        elif self._fails(name):
            pass
        elif path == "/graphql":
            try:
                self._send(name, 200, self.server_of.answer(body.get("query", ""), body.get("variables") or {}))
            except LookupError as error:  # a sweep, run or agent that is not there
                self._send(name, 404, {"errors": [{"message": f"not found: {error}"}]})
        else:
            with self.server_of.lock:
                answer = self.server_of.stream(path.split("/")[-2], body)
            self._send(name, 200, answer)

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" and raw else raw

    def _fails(self, name: str) -> bool:
        """Whether this request was to fail, and has been answered so."""
        with self.server_of.lock:
            failure = next((one for one in self.server_of.failures if one[0] in name and one[2] > 0), None)
            if failure is None:
                return False
            failure[2] -= 1
        if failure[1]:
            self._send(name, failure[1], {"errors": [{"message": "told to fail"}]})
        else:
            self.server_of.requests.append((name, 0))
            self.close_connection = True
            self.connection.close()
        return True

    def _send(self, name: str, status: int, answer: dict) -> None:
        self.server_of.requests.append((name, status))
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
