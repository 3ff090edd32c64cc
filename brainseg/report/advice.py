"""Advice: what a person can do about a scan in the quarantine, code by code. One sentence each; a test holds it complete."""

from brainseg.errors import Code

AGAIN = "The same `brainseg segment` command tries it again."
COPY = "Fetch the file again from where it was first stored and compare sizes and checksums."

ADVICE: dict[Code, str] = {
    Code.AFFINE_MISMATCH: "Modalities or label lie on different grids: resample them onto one grid, then index again.",
    Code.ALPHA: "The picture has a transparent layer: export it again without one.",
    Code.BAD_AFFINE: "The header places voxels nowhere sensible: convert the scan again from its DICOM.",
    Code.BAD_DATATYPE: "Voxels are of a kind that holds no intensities: convert the scan again to 16-bit integers.",
    Code.BAD_HEADER: "The header contradicts itself: convert the scan again from its DICOM.",
    Code.BAD_ID: "The name cannot safely name a file: rename the scan, then index again.",
    Code.BAD_LABELS: "The label has values that its label map does not know: give the right --label-map to `brainseg index`.",
    Code.BAD_MAGIC: "The file is not what its name says: look at where it came from.",
    Code.BAD_SCALE: "The header scales intensities to nonsense: convert the scan again from its DICOM.",
    Code.BAD_SPACING: "Voxel sizes are impossible: correct the header, or convert the scan again.",
    Code.CORRUPT: f"The bytes are damaged. {COPY}",
    Code.CORRUPT_GZIP: f"The compressed stream is damaged or cut short. {COPY}",
    Code.DUPLICATE_CONTENT: "One modality is a copy of another: find the file that was overwritten.",
    Code.DUPLICATE_ID: "Two scans have one name: rename one, then index again.",
    Code.DUPLICATE_SLICE: "Two slices claim one place: remove the surplus one.",
    Code.EMPTY_FILE: f"The file has no bytes. {COPY}",
    Code.EMPTY_MASK: "The label is empty: ask its reader whether that is meant.",
    Code.EMPTY_VOLUME: "A modality shows nothing but one value: find the right file.",
    Code.EXIF_ROTATION: "The picture is stored turned: export it upright.",
    Code.INTERNAL: "A fault in brainseg: please report it with the line below. " + AGAIN,
    Code.INVERTED: "Intensities are stored inverted: convert the scan again.",
    Code.LOSSY: "Lossy compression has touched the voxels: look for the original.",
    Code.MASK_NOT_INTEGER: "The label holds fractions: save it again without interpolation.",
    Code.MISSING_FILE: f"A listed file is gone. {COPY} Then index again.",
    Code.MISSING_KEY: "The HDF5 file lacks what its layout promises: write it again.",
    Code.MISSING_MODALITY: "The model needs a modality that the scan lacks: find it, or use a model without it.",
    Code.MISSING_SLICE: "The stack has gaps: find the missing slices.",
    Code.MIXED_SERIES: "Several series lie in one folder: give each a folder of its own.",
    Code.MODALITY_SUSPECT: "A modality looks like another one: look at the scan and correct the names.",
    Code.MULTI_PAGE: "The picture has several pages: save one a file.",
    Code.NO_CHECKSUM: "Nothing proves that the file is whole: compare it with its source.",
    Code.NO_GEOMETRY: "Where voxels lie is not recorded: convert the scan again from its DICOM.",
    Code.NO_ORIENTATION: "Left and right are not recorded: convert the scan again from its DICOM.",
    Code.NON_FINITE: "Voxels are NaN or infinite: repeat the processing that made them.",
    Code.NOT_3D: "The file is no single volume: split it, a volume a file.",
    Code.NOT_A_FILE: "A folder, pipe or device stands where a file should: put the file there.",
    Code.NOT_DICOM: "The file is no DICOM: remove it from the folder.",
    Code.NOT_GREY: "The image is in colour: export the grey original.",
    Code.NOT_HDF5: f"The file is no HDF5. {COPY}",
    Code.NOT_IMAGE: f"The file is no picture of a known kind. {COPY}",
    Code.NOT_NIFTI: f"The file is no NIfTI. {COPY}",
    Code.OUT_OF_MEMORY: "The scan does not fit: use a machine or GPU with more memory. " + AGAIN,
    Code.OUTLIER: "A few voxels are far out of range: look at the scan.",
    Code.OUTSIDE_ROOT: "A link leads out of the archive: copy the file in.",
    Code.PALETTE: "Colours come from a table: export the grey original.",
    Code.PHI: "The file holds text that may name a patient: de-identify it before it travels.",
    Code.PREAMBLE: "The DICOM preamble holds foreign bytes: write the file anew.",
    Code.SHAPE_MISMATCH: "Modalities or label differ in shape: resample them onto one grid, then index again.",
    Code.SPACING: "Spacing differs slightly between files: check which header is right.",
    Code.TIMEOUT: "Reading did not end in time: look at the mount or store, or raise --scan-seconds. " + AGAIN,
    Code.TOO_LARGE: "The file claims more than a scan can hold: check its header.",
    Code.TRAILING_DATA: "Bytes follow the end of the file: compare it with its source.",
    Code.TRUNCATED: f"The file ends early. {COPY}",
    Code.UNREADABLE: "The store did not give the file: check rights and network. " + AGAIN,
    Code.UNSAFE_PICKLE: "The file would run code when opened: never open it; ask for another format.",
    Code.UNSUPPORTED: "A valid file of a kind that brainseg does not read: convert it to NIfTI.",
    Code.WORKER_DIED: "Every process that tried it died: try the file alone on a machine with more memory. " + AGAIN,
    Code.WRONG_EXTENSION: "The name's ending contradicts the content: rename the file.",
}
UNKNOWN = "No advice: this version of brainseg does not know the code."


def what_to_do(code: str | None) -> str:
    """The advice on a code; a run may have been made by another version, with codes of its own."""
    return ADVICE[Code(code)] if code in set(Code) else UNKNOWN
