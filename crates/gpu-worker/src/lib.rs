//! Runs jobs: fetches free slots, executes, spools outcomes, acknowledges last.
