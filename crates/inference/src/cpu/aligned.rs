//! Buffers that begin on a cache line: a vector that crosses one costs two loads.

/// Numbers per cache line.
const LINE: usize = 64 / size_of::<f32>();

/// A list of numbers whose first lies on a cache line. Grows, never shrinks.
#[derive(Debug, Default)]
pub(super) struct Aligned {
    data: Vec<f32>,
    start: usize,
    length: usize,
}

impl Aligned {
    pub(super) fn zeroed(length: usize) -> Self {
        let mut buffer = Self::default();
        buffer.resize(length);
        buffer
    }

    /// Makes it `length` long. What it holds afterwards is unspecified.
    pub(super) fn resize(&mut self, length: usize) {
        if self.start + length > self.data.len() {
            self.data = vec![0.0; length + LINE];
            let offset = self.data.as_ptr().align_offset(64);
            self.start = if offset < LINE { offset } else { 0 };
        }
        self.length = length;
    }

    pub(super) fn get(&self) -> &[f32] {
        &self.data[self.start..self.start + self.length]
    }

    pub(super) fn get_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.start..self.start + self.length]
    }
}
