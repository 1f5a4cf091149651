"""Records of one server."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner_client.client.server import ServerClient
from tuner_client.request import check_sm_percent
from tuner_core.errors import UnavailableError, UsageError
from tuner_core.model import Record
from tuner_core.store.interface import Page, RecordFilter

if TYPE_CHECKING:
    from tuner_core.store.tvm_folder import ExportReport, ImportReport

_FOLLOW_AGAIN_S = 1.0


class RecordClient(ServerClient):
    """Queries, follows, tags, prunes, exports and imports records of the server."""

    def query(
        self,
        where: RecordFilter | None = None,
        *,
        order: str = "latency",
        top_per_key: int = 0,
        limit: int | None = None,
        with_traces: bool = True,
    ) -> Iterator[Record]:
        """Records that match, streamed: all of them, as they stood at the beginning.

        Args:
            where: The filter; None: everything that is valid.
            order: ``latency`` or ``newest``.
            top_per_key: When positive, only the best so many of each operator, target, device and SM count.
            limit: At most so many; None: all.
            with_traces: Without, records come with an empty trace, and faster.
        """
        return self.store.stream(
            where or RecordFilter(), order=order, top_per_key=top_per_key, limit=limit, with_traces=with_traces
        )

    def page(
        self,
        where: RecordFilter | None = None,
        *,
        limit: int = 100,
        cursor: str | None = None,
        order: str = "latency",
        top_per_key: int = 0,
    ) -> Page:
        """One page of :meth:`query`; see :meth:`tuner_core.store.interface.RecordStore.query`."""
        return self.store.query(
            where or RecordFilter(), limit=limit, cursor=cursor, order=order, top_per_key=top_per_key
        )

    def follow(self, where: RecordFilter | None = None, *, last: int = 0) -> Iterator[Record]:
        """Records as they are committed, without an end: none twice, none left out, over lost connections too.

        Args:
            where: The filter.
            last: Begin with so many of the newest records that are there already, at most 10,000.
        """
        where = where or RecordFilter()
        cursor = self.store.follow(where).cursor
        shown = set()
        for record in reversed(self.page(where, limit=last, order="newest").records if last else ()):
            shown.add(record.trial_id)
            yield record
        lost_at: float | None = None
        while True:
            try:
                for followed in self.store.following(where, cursor):
                    lost_at = None
                    cursor = followed.cursor
                    for record in followed.records:
                        if record.trial_id not in shown:  # committed between the two questions above
                            yield record
            except UnavailableError:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at >= self._reconnect_s:
                    raise
                time.sleep(_FOLLOW_AGAIN_S)
                self.connection.reopen()

    def stats(self) -> dict[str, Any]:
        """Counts, coverage and growth; see :meth:`tuner_core.store.interface.RecordStore.stats`."""
        return self.store.stats()

    def prune(self, older_than: float, team: str = "", *, dry_run: bool = False) -> int:
        """Delete old records; see :meth:`tuner_core.store.interface.RecordStore.prune`.

        Raises:
            PermissionDeniedError: The token is of another team than ``team``.
        """
        return self.store.prune(older_than, team, dry_run=dry_run)

    def tag(self, trial_id: str, tags: Mapping[str, str | None], *, team: str = "") -> Record:
        """Set tags of a record; None removes one.

        Args:
            trial_id: The record.
            tags: Value by name.
            team: For whom, on a server without tokens.

        Raises:
            NotFoundError: There is no such record.
            PermissionDeniedError: It belongs to another team.
        """
        return self._store_for(team).tag(trial_id, tags)

    def export_records(
        self, folder: str | os.PathLike[str], where: RecordFilter | None = None, *, split: bool = False
    ) -> ExportReport:
        """Write valid records as a folder that stock TVM's ``JSONDatabase`` reads.

        Args:
            folder: Made when missing.
            where: Which records.
            split: A folder in ``folder`` for each target, device and SM count, instead of refusing more than one.
        """
        from tuner_core.store.tvm_folder import export_folder

        store = self.store
        with self._progress.step("exporting"), self._quiet():
            return export_folder(Path(folder), store, where or RecordFilter(), split=split)

    def import_records(
        self,
        folder: str | os.PathLike[str],
        *,
        sm_percent: int | None = None,
        device: str | None = None,
        team: str = "",
    ) -> ImportReport:
        """Read a folder written by stock TVM's ``JSONDatabase``, as measured on the server's device.

        Args:
            folder: The folder.
            sm_percent: Share that it was measured with; None: the whole device.
            device: Model, UUID or name (``cuda:1``) of the server's device, where it has several models.
            team: Team that the records belong to.

        Raises:
            UsageError: There is no folder, or the server has devices of several models and nothing says which.
            ConflictError: It has no such device.
        """
        from tuner_client.places import choose_place, first_device
        from tuner_core.model import DeviceInfo

        check_sm_percent(sm_percent)
        if not Path(folder).is_dir():
            raise UsageError(f"there is no folder {folder}")
        host = self.host(sm_percent or 100)
        place = choose_place(host, self.connection.address, device=device)
        one = first_device(host, place)
        cuda_version = one.cuda_version or host.cuda_version
        info = DeviceInfo(one.kind, one.model, one.arch, one.uuid, one.sm_count, one.driver_version, cuda_version)
        store = self.store
        with self._progress.step("importing"), self._quiet():
            from tuner_core.compiler.tvm_setup import load_tvm
            from tuner_core.store.tvm_folder import import_folder

            load_tvm()
            return import_folder(
                Path(folder),
                store,
                device=info,
                sm_percent=sm_percent or 100,
                sm_count=place.sm_count,
                team=team,
            )
