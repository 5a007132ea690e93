// What Node and the browser do alike: an exported folder's probabilities of labels, by transformers.js.

export async function classify({ env, AutoTokenizer, CLIPModel, Tensor, pipeline, RawImage, softmax }, models, given) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = models;
  const { prompts, pixels, shape, image, labels } = given;

  // clipmb's pixels, since the image processor of transformers.js resizes in another way.
  const tokenizer = await AutoTokenizer.from_pretrained("exported");
  const model = await CLIPModel.from_pretrained("exported", { dtype: "fp32" });
  const text = tokenizer(prompts, { padding: true, truncation: true });
  const pixel_values = new Tensor("float32", Float32Array.from(pixels), shape);
  const { logits_per_image } = await model({ ...text, pixel_values });

  // As its documentation does it, from a picture to labels.
  const pipe = await pipeline("zero-shot-image-classification", "exported", { dtype: "fp32" });
  const picture = new RawImage(Uint8Array.from(image.pixels), image.width, image.height, 3);
  const [best] = await pipe(picture, labels);
  return {
    ids: text.input_ids.tolist().map((row) => row.map(Number)),
    probabilities: logits_per_image.tolist().map((row) => softmax(row)),
    best: best.label,
  };
}
