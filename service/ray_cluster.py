"""Joining a Ray cluster, or starting a small Ray here."""

import logging
import os
import socket

import ray
from ray import exceptions

from service.errors import ServiceError


class NoCluster(ServiceError):
    exit_code = 2


def connect(address: str | None, cpus: int) -> bool:
    """Join the cluster at `address`, or start a small Ray here. True if it is ours to end. ServiceError if the
    address does not answer."""
    if ray.is_initialized():
        return False
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # says that a worker without GPU keeps its environment
    common = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        try:
            ray.init(address=address, **common)
        except (OSError, RuntimeError, exceptions.RayError, ValueError) as error:
            if listens(address):  # Ray says the same of a wrong token and of no cluster at all
                raise NoCluster(
                    f"the Ray cluster at {address} lets no one in without its token, or is no Ray {ray.__version__}:"
                    " set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, to the cluster's"
                ) from error
            raise NoCluster(f"no Ray cluster answers at {address}: {first_line(error)}") from error
        return True
    # results are small values; models live in the actors
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=100 * 2**20, **common)
    return True


def listens(address: str) -> bool:
    """Whether anything takes connections at `[ray://]host:port`."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
