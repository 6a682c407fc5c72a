"""An ordinary RunPod handler: text in, speech out. It knows nothing of Ringback.

Input:  {"text": "...", "voice": "en-us" (optional), "words_per_minute": 165 (optional)}
Output: {"audio_base64": a whole WAV file, "sample_rate": 22050, "seconds": 1.9}

The speech comes from eSpeak NG, which the Python package espeakng-loader carries as a library with its
voices, so neither root nor a download of a model is needed. Try it alone:

    python handler.py --test_input '{"input": {"text": "Hello."}}'
"""

import array
import base64
import ctypes
import io
import threading
import wave

import espeakng_loader
import runpod

AUDIO_OUTPUT_SYNCHRONOUS = 2
CHARS_UTF8 = 1
ERROR_OK = 0
RATE_PARAMETER = 1
MAX_TEXT_CHARS = 5_000

SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesizer:
    """eSpeak NG as a function from text to samples. The library has global state, hence the lock."""

    def __init__(self):
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p]
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0)
        if self.sample_rate <= 0:
            raise RuntimeError(f"eSpeak NG did not start with its voices in {data.decode()}")
        self._samples = array.array("h")
        # Kept as an attribute: the library calls it later, so it must not be collected.
        self._callback = SYNTH_CALLBACK(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)
        self._lock = threading.Lock()

    def _collect(self, samples, count, _events):
        if samples and count > 0:
            self._samples.extend(samples[:count])
        return 0

    def speak(self, text, voice, words_per_minute):
        with self._lock:
            self._samples = array.array("h")
            if self._library.espeak_SetVoiceByName(voice.encode()) != ERROR_OK:
                raise ValueError(f"unknown voice {voice!r}")
            self._library.espeak_SetParameter(RATE_PARAMETER, words_per_minute, 0)
            raw = text.encode()
            if self._library.espeak_Synth(raw, len(raw) + 1, 0, 0, 0, CHARS_UTF8, None, None) != ERROR_OK:
                raise RuntimeError("eSpeak NG refused the text")
            self._library.espeak_Synchronize()
            return self._samples


synthesizer = Synthesizer()


def to_wav(samples, sample_rate):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def handler(job):
    given = job["input"]
    text = given.get("text")
    if not isinstance(text, str) or not text.strip():
        return {"error": "input.text must be a text that is not empty"}
    if len(text) > MAX_TEXT_CHARS:
        return {"error": f"input.text has {len(text)} characters, the limit is {MAX_TEXT_CHARS}"}
    samples = synthesizer.speak(text, given.get("voice") or "en-us", int(given.get("words_per_minute") or 165))
    return {
        "audio_base64": base64.b64encode(to_wav(samples, synthesizer.sample_rate)).decode(),
        "sample_rate": synthesizer.sample_rate,
        "seconds": round(len(samples) / synthesizer.sample_rate, 3),
    }


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
