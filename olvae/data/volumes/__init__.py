"""Volumes, as of CT and MRI: NIfTI, DICOM and NRRD, read and written back in real units."""
