// Read the metadata of an ONNX file. onnxruntime-web does not offer them, so they are read from the file's bytes, which
// are a message of protocol buffers (https://protobuf.dev/programming-guides/encoding).

const METADATA_PROPS = 14; // the field of ModelProto; each entry has a key (field 1) and a value (field 2)
const VARINT = 0;
const FIXED64 = 1;
const LENGTH_DELIMITED = 2;
const FIXED32 = 5;

/** The entries whose keys begin with `prefix`, without it, their values parsed as JSON. Throws for a malformed file. */
export function readMetadata(model, prefix) {
  const metadata = {};
  const utf8 = new TextDecoder("utf-8", { fatal: true });
  for (const [field, entry] of lengthDelimitedFields(model)) {
    if (field !== METADATA_PROPS) continue;
    const [key, value] = [1, 2].map((wanted) => {
      for (const [number, bytes] of lengthDelimitedFields(entry)) if (number === wanted) return utf8.decode(bytes);
      return "";
    });
    if (key.startsWith(prefix)) metadata[key.slice(prefix.length)] = JSON.parse(value);
  }
  return metadata;
}

/** [number, bytes] of each field of a message that holds bytes, a string or a message. */
function* lengthDelimitedFields(message) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= message.length) throw new Error("the message ends too early");
      const byte = message[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const tag = varint();
    const wireType = tag % 8;
    if (wireType === VARINT) varint();
    else if (wireType === FIXED64) at += 8;
    else if (wireType === FIXED32) at += 4;
    else if (wireType === LENGTH_DELIMITED) {
      const length = varint();
      yield [Math.floor(tag / 8), message.subarray(at, at + length)];
      at += length;
    } else throw new Error(`unknown wire type ${wireType}`);
  }
}
