-- Files made by jobs. Written by the state-tracker only. The capability in their links is derived from the id and the
-- key file, so no row holds it.
CREATE TABLE artifacts (
  id {bytes} NOT NULL PRIMARY KEY,
  project_id {int} NOT NULL,
  endpoint_id {int} NOT NULL,
  job_id {bytes} NOT NULL,
  sync_id {int} NOT NULL,
  run {int} NOT NULL,
  attempt {int} NOT NULL,
  nonce {int} NOT NULL,
  worker_id TEXT NOT NULL,
  name TEXT NOT NULL,
  content_type TEXT NOT NULL,
  -- Null until the file is stored.
  size_bytes {int},
  sha256 {bytes},
  -- Null once the blob is deleted.
  blob_key TEXT,
  -- 0 ready, 1 confirmed, 2 unconfirmed, 3 expired, 4 uploading.
  state {int} NOT NULL,
  created_at_ms {int} NOT NULL,
  ready_at_ms {int},
  -- When the worker stops waiting for the confirmation; null: nobody waits.
  wait_until_ms {int},
  -- When the wait ended without one.
  given_up_at_ms {int},
  confirmed_at_ms {int},
  -- Whether the receiver told a hash, which then was the right one.
  confirmed_sha256 {int} NOT NULL,
  expires_at_ms {int} NOT NULL,
  -- When somebody should look at the row.
  check_at_ms {int} NOT NULL
) {keyed};

CREATE INDEX artifacts_job ON artifacts (job_id, id);
CREATE INDEX artifacts_due ON artifacts (check_at_ms);
