//! Native routes.
