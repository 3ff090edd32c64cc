"""Every Parquet table brainseg writes: columns, types, units, one sentence each.

Declared here once, published to `schemas/*.json` by `brainseg schemas`, held equal by a test. A column that ends in
`_mm`, `_mm3`, `_px`, `_s` or `_bytes` is in that unit; null always means "unknown or not defined", never zero.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION = 1


def _field(name: str, kind: pa.DataType, says: str, *, required: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=not required, metadata={"description": says})


def _schema(name: str, says: str, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={"table": name, "description": says, "schema_version": str(SCHEMA_VERSION)})


SOURCE = pa.struct(
    [
        _field("uri", pa.string(), "absolute path or s3:// address of one file", required=True),
        _field("role", pa.string(), "`image`, `label`, or `both` for a file that holds image and label", required=True),
        _field("modality", pa.string(), "the one modality in the file; null where the file holds all of them as channels"),
        _field("index", pa.int32(), "position of the slice within the scan, counted from 0; null for a whole volume"),
        _field("size_bytes", pa.int64(), "size when it was listed"),
        _field("tag", pa.string(), "what changes when the content does: ETag on S3, modification time in ns on disk"),
        _field(
            "sha256",
            pa.string(),
            "of the file's bytes; null where no other file of the archive has its size, or where the image is blank, a label, "
            "unreadable or was not compared; what the leakage audit compares",
        ),
    ]
)


def flat_sources(column: pa.ChunkedArray) -> tuple[pa.Array, pa.StructArray]:
    """Take a column of lists of `SOURCE` apart: every source's row, counted from 0, and the sources one after another."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], column.type)
    return pc.list_parent_indices(lists), lists.flatten()


def nested_sources(lengths: Iterable[int], parts: Mapping[str, pa.Array]) -> pa.ListArray:
    """Put a column of lists of `SOURCE` together, from its fields one by one; fields that may be null may lack."""
    fields = [SOURCE.field(i) for i in range(SOURCE.num_fields)]
    count = len(parts["uri"])
    arrays = [parts[f.name].cast(f.type) if f.name in parts or not f.nullable else pa.nulls(count, f.type) for f in fields]
    ends = list(accumulate(lengths, initial=0))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.StructArray.from_arrays(arrays, fields=fields))


ATTRIBUTES = pa.map_(pa.string(), pa.string())

MANIFEST = _schema(
    "manifest",
    "An archive's scans, one row each: where their files are, whose they are, their fold. The only way data enters a job.",
    [
        _field("scan_id", pa.string(), "unique within the manifest, safe as a file name", required=True),
        _field("patient_id", pa.string(), "whose scan it is; null where the archive does not say"),
        _field("dataset", pa.string(), "name of the set, by default that of its layout", required=True),
        _field("layout", pa.string(), "folder convention: lgg, figshare, brats, h5slices, dicom, pictures", required=True),
        _field("reader", pa.string(), "how files become an image: `volumes`, `stack`, `h5slices`, `dicom`", required=True),
        _field("label_map", pa.string(), "name in regions.py that gives the label's values their meaning", required=True),
        _field("modalities", pa.list_(pa.string()), "modalities in the order in which the image stacks them", required=True),
        _field("sources", pa.list_(SOURCE), "every file of the scan", required=True),
        _field("has_label", pa.bool_(), "whether a label file is listed among the sources", required=True),
        _field("size_bytes", pa.int64(), "sum over the sources", required=True),
        _field("fold", pa.int32(), "0..k-1, by patient; null where patients are unknown"),
        _field("attributes", ATTRIBUTES, "further columns of the set's own table, such as site, tumor_type or grade"),
        _field("problem_code", pa.string(), "why the scan cannot be used, seen already while listing; null if nothing was"),
        _field("problem", pa.string(), "the same as one line; such a scan goes to the quarantine without being read"),
    ],
)

REGION = pa.struct(
    [
        _field("region", pa.string(), "name of the region", required=True),
        _field(
            "state",
            pa.string(),
            "`both`, `missed` (label only), `spurious` (prediction only), `both_empty`, `no_label`",
            required=True,
        ),
        _field("tp", pa.int64(), "voxels in label and prediction; null without a label"),
        _field("fp", pa.int64(), "voxels in the prediction only"),
        _field("fn", pa.int64(), "voxels in the label only"),
        _field("tn", pa.int64(), "voxels in neither, over the whole native grid"),
        _field("label_voxels", pa.int64(), "size of the label"),
        _field("prediction_voxels", pa.int64(), "size of the prediction", required=True),
        _field("label_volume_mm3", pa.float64(), "null where spacing is unknown"),
        _field("prediction_volume_mm3", pa.float64(), "null where spacing is unknown"),
        _field("volume_error_mm3", pa.float64(), "prediction minus label"),
        _field("volume_error_relative", pa.float64(), "(prediction - label) / label, in voxels; null for an empty label"),
        _field("dice", pa.float64(), "2tp/(2tp+fp+fn); 0 when missed or spurious; null when both are empty"),
        _field("iou", pa.float64(), "tp/(tp+fp+fn); 0 when missed or spurious; null when both are empty"),
        _field("precision", pa.float64(), "tp/(tp+fp); null for 0/0"),
        _field("recall", pa.float64(), "tp/(tp+fn), also called sensitivity; null for 0/0"),
        _field("specificity", pa.float64(), "tn/(tn+fp); null for 0/0 and when both are empty"),
        _field("accuracy", pa.float64(), "(tp+tn)/all voxels; null when both are empty"),
        _field(
            "hd95_mm",
            pa.float64(),
            "95 % Hausdorff distance; +inf when missed or spurious; null when both empty or spacing unknown",
        ),
        _field("hd95_px", pa.float64(), "the same in pixels, only where spacing is unknown"),
        _field("nsd_1mm", pa.float64(), "surface Dice at 1 mm; 0 when one is empty; null when both are or spacing unknown"),
        _field("nsd_2mm", pa.float64(), "surface Dice at 2 mm"),
        _field("nsd_1px", pa.float64(), "surface Dice at 1 pixel, only where spacing is unknown"),
        _field("nsd_2px", pa.float64(), "surface Dice at 2 pixels, only where spacing is unknown"),
        _field("lesions_label", pa.int32(), "26-connected components of the label"),
        _field("lesions_prediction", pa.int32(), "26-connected components of the prediction", required=True),
        _field("lesions_found", pa.int32(), "label components touched by the prediction"),
        _field("lesions_spurious", pa.int32(), "prediction components that touch no label component"),
        _field("lesion_recall", pa.float64(), "lesions_found / lesions_label; null for 0/0"),
        _field("lesion_precision", pa.float64(), "(lesions_prediction - lesions_spurious) / lesions_prediction; null for 0/0"),
        _field(
            "lesion_f1",
            pa.float64(),
            "harmonic mean of the two; 0 when missed or spurious; null when both are empty or without a label",
        ),
        _field(
            "lesionwise_dice",
            pa.float64(),
            "brats23: sum of the found lesions' Dice over tp + fp + fn lesions; null where there are none, or no label",
        ),
        _field(
            "lesionwise_hd95_mm",
            pa.float64(),
            "brats23: the same of HD95, with 374 mm for a missed or spurious lesion; null also where spacing is unknown",
        ),
        _field("lesionwise_tp", pa.int32(), "brats23: merged label lesions, not ignored, that the prediction touches"),
        _field("lesionwise_fp", pa.int32(), "brats23: prediction components that touch no label lesion, ignored ones included"),
        _field("lesionwise_fn", pa.int32(), "brats23: merged label lesions, not ignored, that the prediction misses"),
        _field("largest_lesion_voxels", pa.int64(), "size of the prediction's largest component", required=True),
        _field("mean_probability", pa.float64(), "mean probability inside the predicted mask; null when it is empty"),
        _field("mean_entropy", pa.float64(), "mean binary entropy (bits) over the head: how undecided the network was"),
        _field(
            "touches_border", pa.bool_(), "whether the predicted mask reaches the image's border in the plane", required=True
        ),
        _field("outside_head_fraction", pa.float64(), "share of the predicted mask outside the head; null when it is empty"),
    ]
)

INTENSITY = pa.struct(
    [
        _field("modality", pa.string(), "the modality", required=True),
        _field("mean", pa.float64(), "mean over the head, in the file's own units; null where it shows nothing"),
        _field("sd", pa.float64(), "standard deviation of the same"),
    ]
)

THUMBNAIL = pa.struct(
    [
        _field("slice_index", pa.int32(), "index along D in display orientation", required=True),
        _field("modality", pa.string(), "the modality shown", required=True),
        _field("image", pa.binary(), "8-bit grey PNG", required=True),
        _field("label", pa.binary(), "8-bit PNG of label values; null without a label"),
        _field("prediction", pa.binary(), "8-bit PNG of predicted label values", required=True),
    ]
)

SCANS = _schema(
    "scans",
    "The fact table of a run: ONE ROW PER SCAN, ok or failed, mask and metrics together.",
    [
        *[MANIFEST.field(n) for n in ("scan_id", "patient_id", "dataset", "label_map", "fold", "sources", "attributes")],
        _field("status", pa.string(), "`ok` or `failed`", required=True),
        _field("error_code", pa.string(), "a code of errors.py; null when ok"),
        _field("error_stage", pa.string(), "`list`, `decode`, `predict` or `finish`; null when ok"),
        _field("error_message", pa.string(), "one line: what was found, what was expected"),
        _field("warnings", pa.list_(pa.string()), "`CODE: one line` each; the scan was used all the same", required=True),
        _field("shape", pa.list_(pa.int32()), "native grid (D, H, W)"),
        _field("spacing_mm", pa.list_(pa.float64()), "along (D, H, W); null where unknown"),
        _field("affine", pa.list_(pa.float64()), "16 numbers, row-major, voxel (i, j, k) to RAS+ mm; null where unknown"),
        _field("orientation", pa.string(), "axis codes of the file's order (i, j, k), such as LPS; null where unknown"),
        _field("modalities", pa.list_(pa.string()), "modalities the network was given"),
        _field("modalities_missing", pa.list_(pa.string()), "modalities the model wants and the scan lacks"),
        _field("modalities_duplicated", pa.list_(pa.string()), "modalities equal to another one to the last bit"),
        _field(
            "intensities",
            pa.list_(INTENSITY),
            "how bright each modality is before normalisation, of about 200,000 evenly spaced voxels: drifts with a scanner",
        ),
        _field(
            "mask", pa.large_binary(), "a complete .nii.gz (or .png for a single image) on the native grid, in label values"
        ),
        _field("mask_encoding", pa.string(), "`nii.gz` or `png`"),
        _field("mask_sha256", pa.string(), "of the `mask` bytes"),
        _field("regions", pa.list_(REGION), "what was measured, one entry per region of the model"),
        _field("thumbnail", THUMBNAIL, "the slice with the largest tumour, for the report; null if switched off"),
        _field("seconds_decode", pa.float64(), "wall seconds: read, decode, check, crop"),
        _field("seconds_predict", pa.float64(), "wall seconds of this scan's share of the forward pass, preparation included"),
        _field("seconds_finish", pa.float64(), "wall seconds: metrics, mask encoding"),
        _field("model_fingerprint", pa.string(), "sha256 over weights and architecture", required=True),
        _field("config_fingerprint", pa.string(), "sha256 over every setting that changes the answer", required=True),
        _field("content_tag", pa.string(), "sha256 over the sources' uri, size and tag: what resume compares", required=True),
        _field("run_id", pa.string(), "names the run", required=True),
        _field("node", pa.string(), "host that finished the scan"),
        _field("attempt", pa.int32(), "1 for the run's first driver, counted up by every resume", required=True),
        _field("finished_at", pa.timestamp("us", tz="UTC"), "when the row was complete", required=True),
    ],
)

EARLIER_SCANS = SCANS.remove(SCANS.get_field_index("intensities"))
"""The fact table of runs that were made before a scan's brightness was recorded."""

METRICS = _schema(
    "metrics",
    "Scan x region, flat: derived from `scans` at the end of a run, for people with DuckDB, pandas or Spark.",
    [
        *[SCANS.field(n) for n in ("scan_id", "patient_id", "dataset", "fold", "attributes", "shape", "spacing_mm")],
        _field(
            "split", pa.string(), "where the model's recorded split puts the patient: train, validation, test; null if nowhere"
        ),
        *[REGION.field(i) for i in range(REGION.num_fields)],
    ],
)

BASELINES = _schema(
    "baselines",
    "What the evaluated scans score without a network, written by `evaluate`: `metrics` once more, a row a baseline.",
    [
        _field(
            "baseline",
            pa.string(),
            "`nothing`, `nearest_training_mask`, or beside a model that began with another's weights `pretrained_weights`",
            required=True,
        ),
        *METRICS,
    ],
)

TABLES: Mapping[str, pa.Schema] = {"manifest": MANIFEST, "scans": SCANS, "metrics": METRICS, "baselines": BASELINES}


def published(name: str) -> str:
    """The contract of one table as JSON text, as it stands in `schemas/<name>.json`."""
    schema = TABLES[name]
    meta = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    body = {
        "table": name,
        "version": SCHEMA_VERSION,
        "description": meta["description"],
        "columns": [_describe(f) for f in schema],
    }
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


def _describe(field: pa.Field) -> dict[str, Any]:
    says = (field.metadata or {}).get(b"description", b"").decode()
    out: dict[str, Any] = {"name": field.name, "type": _type_name(field.type), "nullable": field.nullable, "description": says}
    struct = field.type.value_type if pa.types.is_list(field.type) else field.type
    if pa.types.is_struct(struct):
        out["fields"] = [_describe(struct.field(i)) for i in range(struct.num_fields)]
    return out


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_struct(kind):
        return "struct"
    if pa.types.is_list(kind):
        return f"list<{_type_name(kind.value_type)}>"
    return str(kind)
