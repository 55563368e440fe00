"""The Grafana dashboard, built from the names that service/metrics.py exports: no others can be asked for."""

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from service.metrics import Metrics

RUN = 'app_kubernetes_io_instance=~"$run"'  # PodMonitors copy the label; elsewhere $run is .*
Query = tuple[str, str]  # PromQL, legend
WIDTH = 24  # of Grafana's grid


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model (schema 39). ValueError for a query with a metric that is not exported."""
    panels = list(_placed())
    for panel in panels:
        for target in panel.get("targets", []):
            check_query(target["expr"])
    return {
        "uid": "ziplora",
        "title": "ziplora",
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def metric_names() -> frozenset[str]:
    """All series that a run can export, by the names that queries use."""
    names: set[str] = set()
    for family in Metrics(version("ziplora")).registry.collect():
        match family.type:
            case "counter":
                names.add(f"{family.name}_total")
            case "histogram":
                names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
            case "info":
                names.add(f"{family.name}_info")
            case _:
                names.add(family.name)
    return frozenset(names)


def check_query(query: str) -> None:
    """ValueError unless every metric of ours in it is exported."""
    unknown = set(re.findall(r"\bziplora_\w+", query)) - metric_names()
    if unknown:
        raise ValueError(f"no run exports {', '.join(sorted(unknown))} (in {query})")


def _sections() -> list[tuple[str, list[dict[str, Any]]]]:
    state = "sum by (state) (ziplora_jobs{RUN})"
    done = 'sum(ziplora_jobs{RUN,state=~"committed|given_up"}) / sum(ziplora_jobs{RUN})'
    hours = "sum(ziplora_worker_present_seconds_total{RUN}) / 3600"
    committed = 'sum(ziplora_jobs{RUN,state="committed"})'
    return [
        (
            "Progress",
            [
                _figure("done", "percentunit", done),
                _figure("to go", "s", "max(ziplora_eta_seconds{RUN})"),
                _figure("given up", "short", 'sum(ziplora_jobs{RUN,state="given_up"})'),
                _figure("workers", "short", "sum(ziplora_workers{RUN})"),
                _graph("jobs by state", "short", (state, "{{state}}"), stacked=True),
                _graph("pairs per second", "short", ("sum(ziplora_pairs_per_second{RUN})", "pairs/s")),
            ],
        ),
        (
            "Workers",
            [
                _graph("busy share", "percentunit", ("avg(ziplora_busy_ratio{RUN})", "busy")),
                _graph("there", "short", ("sum by (worker) (ziplora_worker_up{RUN})", "{{worker}}"), stacked=True),
                _graph(
                    "seconds since it was heard of",
                    "s",
                    ("max(time() - ziplora_worker_last_seen_time_seconds{RUN})", "the quietest"),
                ),
                _graph("memory, the largest job", "bytes", ("max(ziplora_peak_memory_bytes{RUN})", "peak")),
            ],
        ),
        (
            "Stages",
            [
                _graph(
                    "seconds per stage, mean",
                    "s",
                    (
                        "sum by (stage) (rate(ziplora_stage_seconds_sum{RUN}[10m]))"
                        " / sum by (stage) (rate(ziplora_stage_seconds_count{RUN}[10m]))",
                        "{{stage}}",
                    ),
                ),
                _graph("seconds per stage, 95 %", "s", (_quantile("ziplora_stage_seconds", "stage"), "{{stage}}")),
                _graph("seconds per tile, 95 %", "s", (_quantile("ziplora_tile_seconds"), "tile")),
                _graph("loading the base, 95 %", "s", (_quantile("ziplora_base_load_seconds"), "base")),
            ],
        ),
        (
            "Failures",
            [
                _graph("attempts by outcome", "short", (_per_hour("ziplora_attempts_total", "outcome"), "{{outcome}}")),
                _graph(
                    "came back through no fault of theirs",
                    "short",
                    (_per_hour("ziplora_returns_total", "reason"), "{{reason}}"),
                ),
                _graph("given up", "short", ("sum by (reason) (ziplora_given_up_total{RUN})", "{{reason}}")),
                _graph(
                    "workers lost, and waiting for the store",
                    "short",
                    ("sum(increase(ziplora_workers_lost_total{RUN}[1h]))", "lost per hour"),
                    ("sum(increase(ziplora_worker_stalls_total{RUN}[1h]))", "signs of waiting per hour"),
                ),
            ],
        ),
        (
            "Data",
            [
                _graph(
                    "bytes per second",
                    "Bps",
                    ("sum(rate(ziplora_read_bytes_total{RUN}[10m]))", "read"),
                    ("sum(rate(ziplora_written_bytes_total{RUN}[10m]))", "written"),
                ),
                _graph(
                    "cache hits",
                    "percentunit",
                    (
                        'sum by (cache) (rate(ziplora_cache_requests_total{RUN,result="hit"}[10m]))'
                        " / sum by (cache) (rate(ziplora_cache_requests_total{RUN}[10m]))",
                        "{{cache}}",
                    ),
                ),
            ],
        ),
        (
            "Cost",
            [
                _figure("worker hours", "h", hours),
                _figure("cost so far", "currencyUSD", f"{hours} * $price"),
                _figure("cost per pair", "currencyUSD", f"{hours} * $price / {committed}"),
                _figure("tiles", "short", "sum(ziplora_tiles_total{RUN})"),
            ],
        ),
    ]


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": "label_values(ziplora_run_start_time_seconds, app_kubernetes_io_instance)",
            "includeAll": True,
            "allValue": ".*",
            "refresh": 2,
        },
        {"name": "price", "label": "price of a worker hour", "type": "textbox", "query": "2.5"},
    ]


def _quantile(name: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile(0.95, sum by ({labels}) (rate({name}_bucket{{RUN}}[10m])))"


def _per_hour(name: str, by: str) -> str:
    return f"sum by ({by}) (increase({name}{{RUN}}[1h]))"


def _figure(title: str, unit: str, query: str) -> dict[str, Any]:
    return _panel("stat", title, unit, 6, 4, (query, ""))


def _graph(title: str, unit: str, *queries: Query, stacked: bool = False) -> dict[str, Any]:
    panel = _panel("timeseries", title, unit, 12, 8, *queries)
    if stacked:
        panel["fieldConfig"]["defaults"]["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 30}
    return panel


def _panel(kind: str, title: str, unit: str, width: int, height: int, *queries: Query) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "type": kind,
        "title": title,
        "datasource": source,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {"refId": chr(65 + i), "datasource": source, "expr": query.replace("RUN", RUN), "legendFormat": legend}
            for i, (query, legend) in enumerate(queries)
        ],
    }


def _placed() -> Iterator[dict[str, Any]]:
    """Panels from left to right and top to bottom, each section under a row of its name."""
    number = y = 0
    for title, panels in _sections():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            "panels": [],
        }
        x, y, height = 0, y + 1, 0
        for panel in panels:
            place = panel["gridPos"]
            if x + place["w"] > WIDTH:
                x, y, height = 0, y + height, 0
            number += 1
            yield {**panel, "id": number, "gridPos": {**place, "x": x, "y": y}}
            x, height = x + place["w"], max(height, place["h"])
        y += height
