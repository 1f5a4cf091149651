"""Folders of stock TVM's ``ms.database.JSONDatabase``: into a store and out of it."""

from tuner_core.store.tvm_folder.exporting import ExportReport, export_folder
from tuner_core.store.tvm_folder.importing import ImportReport, import_folder

__all__ = ["ExportReport", "ImportReport", "export_folder", "import_folder"]
