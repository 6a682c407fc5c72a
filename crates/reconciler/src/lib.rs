//! Finds what SQL says should be on its way and is not, and repairs it through the tracker.
