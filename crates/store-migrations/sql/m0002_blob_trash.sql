-- Blobs of removed rows, written with their removal and dropped once they are deleted: a crash in between leaves a row
-- here and never a blob that nobody knows. A key that ends in a slash stands for everything below it.
CREATE TABLE blob_trash (
  blob_key TEXT NOT NULL PRIMARY KEY,
  added_at_ms {int} NOT NULL
) {keyed};

CREATE INDEX blob_trash_added ON blob_trash (added_at_ms);

-- Lists of a project's jobs, newest first. Ids rise with time, so that an insert appends.
CREATE INDEX jobs_project ON jobs (project_id, id);
