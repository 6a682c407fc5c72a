//! The model as a list of kernels and matrix products. What runs them (the GPU, a recording graph, the emulator of
//! the tests) is behind [`Ops`], so that one order of work, one set of addresses and one list of arguments serve all.

use crate::{
    input::Shape,
    kernels::{self, Kernel, KernelShape},
    weights::{HeadAt, LayerAt, LinearAt, NormAt, WeightMap},
};
use ringback_inference::{Encoder, Pooling, Task};

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// An address in the device's memory.
    Pointer(u64),
    /// A number without sign.
    U32(u32),
    /// A fraction.
    F32(f32),
}

/// `y[rows][outputs] = x[rows][inputs] · weight[outputs][inputs]ᵀ (+ bias)`, all in half precision with fp32 sums.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gemm {
    pub(crate) rows: u32,
    pub(crate) outputs: u32,
    pub(crate) inputs: u32,
    pub(crate) y: u64,
    pub(crate) x: u64,
    pub(crate) weight: u64,
    pub(crate) bias: Option<u64>,
}

/// What can be asked of a device, in order.
pub(crate) trait Ops {
    type Error;

    /// Starts a kernel with `grid` blocks of [`Kernel::threads`].
    fn launch(&mut self, kernel: Kernel, grid: [u32; 2], args: &[Arg]) -> Result<(), Self::Error>;

    /// Multiplies.
    fn gemm(&mut self, gemm: Gemm) -> Result<(), Self::Error>;
}

/// What the last layer becomes.
#[derive(Clone, Copy, Debug)]
enum Output {
    Pool { flags: u32 },
    Classify(HeadAt),
}

/// A model ready to be run: addresses of its weights and of the workspace.
#[derive(Clone, Debug)]
pub(crate) struct Forward {
    shape: KernelShape,
    map: WeightMap,
    weights: u64,
    workspace: u64,
    rows: u64,
    eps: f32,
    output: Output,
}

/// Bytes of the workspace for that many rows.
pub(crate) fn workspace_bytes(shape: KernelShape, rows: u32) -> u64 {
    let numbers = 2 * u64::from(shape.hidden) + wide(shape);
    u64::from(rows) * numbers * 2
}

/// Numbers per row of the wide buffer: query, key, value and their result, later the inside of the feed-forward part.
fn wide(shape: KernelShape) -> u64 {
    u64::from(4 * shape.hidden).max(u64::from(shape.intermediate))
}

impl Forward {
    /// `weights` and `workspace` are addresses; the workspace has room for `rows`, a multiple of 8.
    pub(crate) fn new(
        encoder: &Encoder,
        shape: KernelShape,
        weights: u64,
        workspace: u64,
        rows: u32,
    ) -> Self {
        let map = WeightMap::of(encoder);
        let output = match map.head {
            Some(head) if encoder.task != Task::Embed => Output::Classify(head),
            _ => {
                let first = if encoder.pooling == Pooling::Cls { kernels::POOL_FIRST } else { 0 };
                Output::Pool { flags: first | if encoder.normalize { kernels::POOL_NORMALISE } else { 0 } }
            }
        };
        let eps = encoder.config.layer_norm_eps;
        Self { shape, map, weights, workspace, rows: u64::from(rows), eps, output }
    }

    /// Runs a batch that [`crate::input::pack`] has put at the address `input`; the rows of the result go to `out`.
    pub(crate) fn run<O: Ops>(
        &self,
        ops: &mut O,
        shape: Shape,
        input: u64,
        out: u64,
    ) -> Result<(), O::Error> {
        let word = |position: usize| input + 4 * position as u64;
        let starts = word(shape.starts_at());
        let hidden = u64::from(self.shape.hidden);
        // Three buffers, one after the other.
        let x = self.workspace;
        let t = x + 2 * self.rows * hidden;
        let wide = t + 2 * self.rows * hidden;
        let buffers = Buffers { x, t, qkv: wide, attended: wide + 2 * self.rows * 3 * hidden, inner: wide };

        let norm = self.map.embedding_norm;
        let grid = [kernels::blocks_of_rows(shape.tokens), 1];
        ops.launch(
            Kernel::EmbedLayerNorm,
            grid,
            &[
                Arg::Pointer(x),
                Arg::Pointer(word(0)),
                Arg::Pointer(word(shape.tokens as usize)),
                self.at(self.map.word),
                self.at(self.map.position),
                self.at(self.map.token_type),
                self.at(norm.gamma),
                self.at(norm.beta),
                Arg::F32(self.eps),
                Arg::U32(shape.tokens),
            ],
        )?;
        for layer in &self.map.layers {
            self.layer(ops, shape, layer, buffers, starts, word(shape.tiles_at()))?;
        }
        match self.output {
            Output::Classify(head) => ops.launch(
                Kernel::Classify,
                [shape.sequences, 1],
                &[
                    Arg::Pointer(out),
                    Arg::Pointer(x),
                    Arg::Pointer(starts),
                    self.at(head.dense.weight),
                    self.at(head.dense.bias),
                    self.at(head.classifier.weight),
                    self.at(head.classifier.bias),
                    Arg::U32(head.labels),
                ],
            ),
            Output::Pool { flags } => {
                let args = [Arg::Pointer(out), Arg::Pointer(x), Arg::Pointer(starts), Arg::U32(flags)];
                ops.launch(Kernel::Pool, [shape.sequences, 1], &args)
            }
        }
    }

    fn layer<O: Ops>(
        &self,
        ops: &mut O,
        shape: Shape,
        layer: &LayerAt,
        buffers: Buffers,
        starts: u64,
        tiles: u64,
    ) -> Result<(), O::Error> {
        let Buffers { x, t, qkv, attended, inner } = buffers;
        let (hidden, intermediate) = (self.shape.hidden, self.shape.intermediate);
        let rows = shape.tokens;
        let weight = |part: LinearAt| self.weights + part.weight;
        let bias = Some(self.weights + layer.qkv.bias);
        ops.gemm(Gemm {
            rows,
            outputs: 3 * hidden,
            inputs: hidden,
            y: qkv,
            x,
            weight: weight(layer.qkv),
            bias,
        })?;
        // The softmax is taken to the base 2.
        let scale = std::f32::consts::LOG2_E / (self.shape.head_dim as f32).sqrt();
        let args = [
            Arg::Pointer(attended),
            Arg::Pointer(qkv),
            Arg::Pointer(starts),
            Arg::Pointer(tiles),
            Arg::F32(scale),
        ];
        ops.launch(Kernel::Attention, [shape.tiles, self.shape.heads()], &args)?;
        let y = Gemm { rows, outputs: hidden, inputs: hidden, y: t, x: attended, weight: 0, bias: None };
        ops.gemm(Gemm { weight: weight(layer.attention_output), ..y })?;
        self.residual_norm(ops, rows, buffers, layer.attention_output, layer.attention_norm)?;
        let y = Gemm { rows, outputs: intermediate, inputs: hidden, y: inner, x, weight: 0, bias: None };
        ops.gemm(Gemm { weight: weight(layer.intermediate), ..y })?;
        ops.launch(
            Kernel::BiasGelu,
            [kernels::blocks_of_packs(rows, intermediate), 1],
            &[Arg::Pointer(inner), self.at(layer.intermediate.bias), Arg::U32(rows)],
        )?;
        let y = Gemm { rows, outputs: hidden, inputs: intermediate, y: t, x: inner, weight: 0, bias: None };
        ops.gemm(Gemm { weight: weight(layer.output), ..y })?;
        self.residual_norm(ops, rows, buffers, layer.output, layer.output_norm)
    }

    /// x = norm(t + bias + x).
    fn residual_norm<O: Ops>(
        &self,
        ops: &mut O,
        rows: u32,
        buffers: Buffers,
        linear: LinearAt,
        norm: NormAt,
    ) -> Result<(), O::Error> {
        ops.launch(
            Kernel::ResidualLayerNorm,
            [kernels::blocks_of_rows(rows), 1],
            &[
                Arg::Pointer(buffers.x),
                Arg::Pointer(buffers.t),
                Arg::Pointer(buffers.x),
                self.at(linear.bias),
                self.at(norm.gamma),
                self.at(norm.beta),
                Arg::F32(self.eps),
                Arg::U32(rows),
            ],
        )
    }

    fn at(&self, offset: u64) -> Arg {
        Arg::Pointer(self.weights + offset)
    }
}

/// Addresses in the workspace.
#[derive(Clone, Copy, Debug)]
struct Buffers {
    /// The rows as they come out of a layer.
    x: u64,
    /// A product before it is added to `x`.
    t: u64,
    qkv: u64,
    attended: u64,
    inner: u64,
}
