-- Where the time of the try that succeeded went, packed (store::deliveries::Timings). Null: not measured.
ALTER TABLE deliveries ADD COLUMN timings {int};
