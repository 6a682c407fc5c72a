-- Progress or streamed text of an attempt that is over: what no receiver has taken of it is superseded.
ALTER TABLE events ADD COLUMN overtaken {int} NOT NULL DEFAULT 0;

-- What the receiver answered to the try that succeeded, cut off.
ALTER TABLE deliveries ADD COLUMN response {bytes};
