//! Messages on the wire between services: prost types from proto/ and checked conversions.
