"""GOF's released checkpoints: state dicts of both networks, and `ema.pth`, an average without names.

All is named and ordered as in π-GAN's. Beside them lie the "early" checkpoints from which the authors start training.
"""

from gan3d.official.pigan import official_discriminator as official_discriminator
from gan3d.official.pigan import official_ema as official_ema
from gan3d.official.pigan import official_generator as official_generator

PUBLISHED = ("generator.pth, discriminator.pth and ema.pth for BFM, CelebA and Cats, one folder each, at "
             "https://drive.google.com/drive/folders/1dh2PF29Z4UhS8lk_8WCGDgkoYhKwDBQu; give the folder's path, and "
             "data=bfm, data=celeba or data=cats")
