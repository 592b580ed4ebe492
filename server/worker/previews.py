"""Previews between steps. An image never fails for want of one: what goes wrong is logged, and the preview left out."""

import logging

from server.worker.events import PreviewPixels
from server.worker.executor import Executor
from server.worker.images import Pixels
from server.worker.lanes import Pending
from server.worker.reports import Reports
from server.worker.sequences import ImageSequence

log = logging.getLogger(__name__)


class Previews:
    """Has previews made as the requests ask for them, and reports them."""

    def __init__(self, executor: Executor, reports: Reports) -> None:
        self._executor = executor
        self._reports = reports

    def begin(self, sequence: ImageSequence) -> Pending[Pixels] | None:
        """Starts a preview behind the step given to the device last, if the request wants one."""
        done, interval = sequence.step, sequence.request.preview_interval
        if not interval or done % interval or done == sequence.steps:
            return None
        try:
            return self._executor.preview(sequence, done)
        except Exception as error:  # noqa: BLE001 - the boundary between a preview and the images
            _leave_out(sequence, done, error)
            return None

    def report(self, sequence: ImageSequence, done: int, preview: Pending[Pixels]) -> None:
        """Reports the preview that was begun after `done` steps."""
        try:
            pixels = preview.result()
        except Exception as error:  # noqa: BLE001 - the boundary between a preview and the images
            _leave_out(sequence, done, error)
            return
        self._reports.note(sequence.key, PreviewPixels(done, sequence.image_index, pixels))


def _leave_out(sequence: ImageSequence, done: int, error: Exception) -> None:
    log.warning("no preview of request %s after step %d: %s", sequence.request.request_id, done, error)
