"""optuna-dashboard on a campaign, running or not."""

from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from flows.directory.campaign_directory import Directory
from merging.errors import SettingsError
from search.ledger.live_study import LedgerStorage


def make_dashboard(directory: str, host: str, port: int) -> WSGIServer:
    """A server of optuna-dashboard that shows a campaign's ledger, and follows it while it grows.

    Args:
        directory: The campaign's, local or at an address.
        host: Where to listen.
        port: The same; 0 for any that is free.

    Raises:
        SettingsError: There is no campaign, the package is not installed, or the port is taken.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise SettingsError("optuna-dashboard is not installed: pip install 'mergequest[dashboard]'") from error
    kept = Directory(directory)
    storage = LedgerStorage(kept.ledger, kept.campaign().name)
    try:
        return make_server(host, port, wsgi(storage), _Threads, _Quiet)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port") from error


class _Threads(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of requests."""
